"""How much of the embedded shapes autoencoders keep: of how many held-out scenes the reconstruction shows what the
caption says, by the rules of `evaluate.py --obedience shapes`."""

from __future__ import annotations

import torch

from training.measuring.obedience import OBJECTS, Rules
from training.models.autoencoders import load_autoencoder
from training.models.reconstructions import reconstructed
from training.settings.flags import Parser, run_main
from training.shapes.rendering import render
from training.shapes.scenes import scene
from training.shapes.wording import captions

FIRST = 5_000_000  # the seed of the first scene: held-out pairs of colour and shape are never among those packed


def main() -> None:
    """A row of Markdown for each autoencoder: shares in percent of scenes of one, two and three objects."""
    parser = Parser(__doc__ or "")
    parser.add_argument("autoencoders", nargs="+", metavar="RUN")
    parser.add_argument("--count", type=int, default=300, help="scenes of each number of objects")
    args = parser.read()
    seeds = range(FIRST, FIRST + args.count)
    shown = {objects: [scene(seed, objects=objects, held_out=True) for seed in seeds] for objects in OBJECTS}
    print("| autoencoder | one object | two | three |\n| --- | --- | --- | --- |")
    for folder in args.autoencoders:
        model, rules = load_autoencoder(folder), Rules()
        for objects, scenes in shown.items():
            pixels = torch.stack([torch.from_numpy(render(each)) for each in scenes]).permute(0, 3, 1, 2)
            kept = torch.cat([reconstructed(model, part) for part in pixels.split(100)])
            rules.see(objects, kept, [captions(each)[0] for each in scenes])
        shares = (100 * rules.numbers()[f"obedience_{objects}"] for objects in OBJECTS)
        print(f"| {folder} | {' | '.join(f'{share:.1f}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    run_main(main)
