"""A new word for the embedded demo, from eight pictures of a thing that it never saw: textual inversion of a yellow
square. Usage: python scripts/recipes/new_word.py --output DIR [--kin WORD] [--max-steps N]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from itertools import count, islice, product
from pathlib import Path

from PIL import Image

from training.models.adapters import Chosen
from training.models.assembly import HashedPipeline, load_pipeline
from training.shapes.checker import check
from training.shapes.rendering import render
from training.shapes.scenes import BACKGROUNDS, POSITIONS, SIZES, scene
from training.shapes.wording import captions

THING, WORD, PICTURES = "yellow square", "blicket", 8


def run(script: str, *words: object) -> None:
    """Run one of the scripts."""
    subprocess.run([sys.executable, Path(__file__).parents[1] / f"{script}.py", *map(str, words)], check=True)


def obeyed(pipeline: HashedPipeline, prompts: list[str], meant: list[str]) -> float:
    """The share of prompts whose picture shows what is meant, by the rules of the embedded shapes."""
    pixels = next(pipeline.pixels(prompts, list(range(len(prompts))), batch_size=len(prompts)))
    images = pixels.permute(0, 2, 3, 1).numpy()
    return sum(check(image, caption)["obeyed"] for image, caption in zip(images, meant, strict=True)) / len(meant)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--kin", default="square")
parser.add_argument("--max-steps", default="300")
args = parser.parse_args()
out = args.output
(out / "pictures").mkdir(parents=True)
things = (found for seed in count() for found in [scene(seed, objects=1, held_out=True)] if THING in captions(found)[0])
for number, thing in enumerate(islice(things, PICTURES)):
    Image.fromarray(render(thing)).save(out / "pictures" / f"{number}.png")
    (out / "pictures" / f"{number}.txt").write_text("\n".join(captions(thing)).replace(THING, WORD))
run("make_shards", "pack", out / "pictures", "--output", out / "data", "--resolution", 32, "--val-fraction", 0)
run("encode_latents", "--autoencoder", "demo", "--data", out / "data", "--output", out / "latents", "--device", "cpu")
words = ["--adapter.words", WORD, "--adapter.kin", args.kin, "--max-steps", args.max_steps, "--device", "cpu"]
given = ["--base", "demo", "--config", "textual-inversion", "--latents", out / "latents", "--output", out / "run"]
run("train_denoiser", *given, *words)
meant = [f"a {size} {THING} at the {place} on a {ground} background"
         for size, place, ground in product(SIZES, POSITIONS, BACKGROUNDS)]  # fmt: skip
told = [caption.replace(THING, WORD) for caption in meant]
base, taught = (load_pipeline("demo", "cpu", adapters=adapters) for adapters in ([], [Chosen(out / "run")]))
for name, pipeline, prompts in ((f"{THING}, base", base, meant), (f"{WORD}, base", base, told), (WORD, taught, told)):
    print(f"{name}: {obeyed(pipeline, prompts, meant):.1%} of {len(meant)}")
