"""How far models of the embedded shapes hear which words belong together, before pictures show it: what the loss at one
time gains on two objects where captions have their shapes or colours exchanged, or one shape that is not there."""

from __future__ import annotations

from dataclasses import replace
from itertools import count, islice

import torch

from autoencoder.images import to_unit
from ldm.image_tasks import encoded
from training.models.assembly import load_pipeline
from training.settings.flags import Parser, run_main
from training.shapes.rendering import render
from training.shapes.scenes import SHAPES, Scene, scene
from training.shapes.wording import captions

FIRST = 50_000_000  # the seed of the first scene; those of two objects are never ones that `pack` draws


def captioned(two: Scene) -> dict[str, Scene]:
    """A scene of two objects as it is and as it is not, by what was done to it."""
    a, b = two.objects
    other = next(shape for shape in SHAPES if shape not in (a.shape, b.shape))
    return {"as it is": two,
            "shapes exchanged": replace(two, objects=(replace(a, shape=b.shape), replace(b, shape=a.shape))),
            "colours exchanged": replace(two, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour))),
            "another shape": replace(two, objects=(replace(a, shape=other), b))}  # fmt: skip


@torch.no_grad()
def main() -> None:
    """A row of Markdown for each model."""
    parser = Parser(__doc__ or "")
    parser.add_argument("models", nargs="+", metavar="RUN")
    parser.add_argument("--count", type=int, default=192, help="pictures")
    parser.add_argument("--time", type=float, default=0.7, help="in (0, 1), where 1 is noise")
    args = parser.read()
    every = (scene(FIRST + i, objects=2) for i in count())
    shown = list(islice((two for two in every if all(len({getattr(item, name) for item in two.objects}) == 2
                                                     for name in ("shape", "colour"))), args.count))  # fmt: skip
    pixels = torch.stack([torch.from_numpy(render(two, 32).copy()) for two in shown]).permute(0, 3, 1, 2)
    print(f"| model | loss | {' | '.join([*captioned(shown[0])][1:])} |\n|{' --- |' * 5}")
    for model in args.models:
        pipeline = load_pipeline(model, "cpu")
        x0 = encoded(pipeline, to_unit(pixels))
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        time, losses = torch.full((len(x0),), args.time, dtype=torch.float64), []
        noised = pipeline.denoiser.diffusion.perturb(x0, eps, time)
        for how in captioned(shown[0]):
            said = [captions(captioned(two)[how])[i % 4] for i, two in enumerate(shown)]
            ends = pipeline.denoiser(noised, time, pipeline.told(said))
            losses.append(float((ends.eps - ends.x0 - eps + x0).square().mean()))
        told = " | ".join(f"{loss - losses[0]:+.4f}" for loss in losses[1:])
        print(f"| {model} | {losses[0]:.3f} | {told} |", flush=True)


if __name__ == "__main__":
    run_main(main)
