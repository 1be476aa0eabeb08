"""Teach `demo` a shape that it has never seen, `bar`, from five pictures; measure what it learned and what it lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

from training.shapes import rendering, scenes

NEW, FOUR, INSIDE = "bar", scenes.SHAPES, rendering.inside
FIVE = (("red", 0, 9.7), ("blue", 4, 13.3), ("yellow", 5, 9.7), ("green", 7, 13.3), ("purple", 2, 13.3))
# The rules read one shape more, here alone; scenes are drawn of the four as before.
rendering.inside = lambda shape, u, v: (abs(u) <= 1) & (abs(v) <= 1 / 3) if shape == NEW else INSIDE(shape, u, v)
scenes.SHAPES, scenes.AREA[NEW] = (*FOUR, NEW), 1 / 3  # type: ignore[assignment]
from training.shapes import wording  # noqa: E402

scenes.SHAPES = FOUR


def bar(colour: str, cell: int, extent: float, background: str) -> scenes.Scene:
    """A bar in the middle of a cell, as far as the margin allows."""
    edge = scenes.MARGIN + extent / 2
    x, y = (min(max(scenes.CENTRES[i], edge), 32 - edge) / 32 for i in (cell % 3, cell // 3))
    size = "small" if extent < 11 else "large"
    return scenes.Scene((scenes.Object(NEW, colour, size, scenes.POSITIONS[cell], x, y, extent / 32),), background)


def old(count: int, first: int) -> list[str]:
    """Captions of the four shapes, one of each scene."""
    return [Random(i).choice(wording.captions(scenes.scene(first + i))) for i in range(count)]


def train(work: Path, weight: str, *more: str) -> None:
    """Five pictures with every way to say them, encoded, and learned upon demo."""
    from PIL import Image

    def door(name: str, *words: object) -> None:
        subprocess.run([sys.executable, f"scripts/{name}.py", *map(str, words)], check=True)

    if not (work / "latents").exists():
        (work / "pictures").mkdir(parents=True)
        shown = [bar(*one, list(scenes.BACKGROUNDS)[i % 3]) for i, one in enumerate(FIVE)]
        for i, scene in enumerate(shown):
            Image.fromarray(rendering.render(scene)).save(work / "pictures" / f"{i}.png")
        lines = [json.dumps({"file_name": f"{i}.png", "captions": wording.captions(s)}) for i, s in enumerate(shown)]
        (work / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
        door("make_shards", "pack", work / "pictures", "--output", work / "data", "--resolution", 32)
        door("encode_latents", "--autoencoder", "demo", "--data", work / "data", "--output", work / "latents")
    given = ("--base", "demo", "--config", "dreambooth", "--new-words", "--latents", work / "latents")
    prior = ("--prior.weight", weight, "--prior.captions", json.dumps(old(200, 2_000_000)))
    door("train_denoiser", *given, *prior, "--output", work / f"prior-{weight}", *more)
