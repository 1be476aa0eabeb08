"""Teach `demo` a shape that it has never seen, a bar, from five pictures; tell what it learned and what it lost."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from bars import FIVE, NEW, check, old, show

from training.models.assembly import load_pipeline
from training.settings.flags import Parser, run_main


def obeyed(model: str, captions: list[str]) -> Any:
    """Of each caption, whether `model`'s picture of it, drawn by its number in ten steps, is one of it: 1 or 0."""
    pipeline, verdicts = load_pipeline(model, "cpu"), list[bool]()
    plan = dataclasses.replace(pipeline.sampling, steps=10)
    for pixels in pipeline.pixels(captions, range(len(captions)), sampling=plan, batch_size=50):
        pictures = pixels.permute(0, 2, 3, 1).numpy()
        verdicts += [check(*pair)["obeyed"] for pair in zip(pictures, captions[len(verdicts) :], strict=False)]
    return np.array(verdicts, dtype=float)


def train(work: Path, seed: int) -> None:
    """Five pictures, encoded, and learned upon `demo`, with its own pictures of the four shapes beside and without."""

    def door(name: str, *words: object) -> None:
        subprocess.run([sys.executable, f"scripts/{name}.py", *map(str, words)], check=True)
    show(work / "pictures")
    door("make_shards", "pack", work / "pictures", "--output", work / "data", "--resolution", 32)
    door("encode_latents", "--autoencoder", "demo", "--data", work / "data", "--output", work / "latents")
    given = ["--base", "demo", "--config", "dreambooth", "--new-words", "--latents", work / "latents"]
    given += ["--seed", seed, "--batch-size", len(FIVE), "--adapter.text", '["*"]']  # the word is read by its layers
    given += ["--prior.captions", json.dumps(old(800, 2_000_000)), "--prior.count", 800, "--sample.steps", 8]
    for weight in (20, 0):
        door("train_denoiser", *given, "--prior.weight", weight, "--output", work / f"weight-{weight}")


def main() -> None:
    """Train, then measure; or measure what is trained."""
    add = (parser := Parser(__doc__ or "")).add_argument
    add("--output", metavar="DIR", required=True, help="where all of it goes, each seed's in a folder of its own")
    add("--seed", metavar="N", type=int, default=0, help="of the training")
    add("--count", metavar="N", type=int, default=1000, help="old captions that are measured")
    if not (work := Path((args := parser.read()).output) / f"seed-{args.seed}").exists():
        train(work, args.seed)
    new, before = 3 * NEW, obeyed("demo", captions := old(args.count, 1_000_000))
    print(f"demo: {before.mean():.1%} of {args.count} old captions")
    for run in (f"{work}/weight-20", f"{work}/weight-0"):
        learned, change = obeyed(run, new).mean(), obeyed(run, captions) - before
        mean, spread = 100 * change.mean(), 196 * change.std() / len(change) ** 0.5
        print(f"{run}: {learned:.1%} of {len(new)} new, old {mean:+.1f} +- {spread:.1f} points")

if __name__ == "__main__":
    run_main(main)
