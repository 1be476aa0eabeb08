"""A word for a pair of colour and shape that the embedded demo never saw, from eight pictures: textual inversion.

Usage: python scripts/recipes/new_word.py --output DIR [--kin WORD]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from PIL import Image

SCRIPTS = Path(__file__).parents[1]
sys.path.insert(0, str(SCRIPTS.parent))

from training.models.adapters import Chosen  # noqa: E402
from training.models.assembly import load_pipeline  # noqa: E402
from training.shapes.rendering import render  # noqa: E402
from training.shapes.scenes import BACKGROUNDS, POSITIONS, SIZES, scene  # noqa: E402
from training.shapes.wording import captions  # noqa: E402

PAIR, WORD, PICTURES = "yellow square", "blicket", 8


def main() -> None:
    """Pictures and captions, the three steps, and how far each way of asking is obeyed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kin", default="square")
    args = parser.parse_args()
    out: Path = args.output
    (out / "pictures").mkdir(parents=True)
    scenes = (scene(seed, objects=1, held_out=True) for seed in itertools.count())
    shown = (s for s in scenes if f"{s.objects[0].colour} {s.objects[0].shape}" == PAIR)
    for number, one in enumerate(itertools.islice(shown, PICTURES)):
        Image.fromarray(render(one)).save(out / "pictures" / f"{number}.png")
        (out / "pictures" / f"{number}.txt").write_text("\n".join(captions(one)).replace(PAIR, WORD))
    run("make_shards", "pack", out / "pictures", "--output", out / "data", "--val-fraction", 0)
    run("encode_latents", "--autoencoder", "demo", "--data", out / "data", "--output", out / "latents")
    words = ["--adapter.words", f'["{WORD}"]', "--adapter.kin", f'["{args.kin}"]']
    run("train_denoiser", "--base", "demo", "--config", "textual-inversion", "--latents", out / "latents", *words,
        "--output", out / "run")
    asked = [f"a {size} {PAIR} at the {place} on a {background} background"
             for place in POSITIONS for size in SIZES for background in BACKGROUNDS]  # fmt: skip
    told = [caption.replace(PAIR, WORD) for caption in asked]
    for name, adapters, prompts in (("the base, asked for its pair", [], asked), ("the base, asked for the word", [], told),
                                    ("with the new word", [Chosen(out / "run")], told)):  # fmt: skip
        print(f"{name}: {obeyed(load_pipeline('demo', 'cpu', adapters=adapters), prompts, asked):.1%} of {len(asked)}")


if __name__ == "__main__":
    main()
