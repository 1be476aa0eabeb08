"""A shape that the embedded data have not: drawn, worded and judged. Importing it has the rules of this process read
one shape more; scenes are still drawn of the four."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from PIL import Image

from training.shapes import rendering, scenes

FOUR, INSIDE = scenes.SHAPES, rendering.inside
rendering.inside = lambda shape, u, v: (abs(u) <= 1) & (abs(v) <= 1 / 3) if shape == "bar" else INSIDE(shape, u, v)
scenes.SHAPES, scenes.AREA["bar"] = (*FOUR, "bar"), 1 / 3  # type: ignore[assignment]
from training.shapes import checker, wording  # noqa: E402

scenes.SHAPES = FOUR
check = checker.check
NEW = [f"{'an' if c[0] == 'o' else 'a'} {c} bar at the {place}" for c in scenes.COLOURS for place in scenes.POSITIONS]


def bar(colour: str, cell: int, extent: float, ground: str) -> scenes.Scene:
    """A bar in the middle of a cell, as far as the margin allows."""
    edge, size = scenes.MARGIN + extent / 2, "small" if extent < 11 else "large"
    x, y = (min(max(scenes.CENTRES[i], edge), scenes.UNIT - edge) / scenes.UNIT for i in (cell % 3, cell // 3))
    item = scenes.Object("bar", colour, size, scenes.POSITIONS[cell], x, y, extent / scenes.UNIT)
    return scenes.Scene((item,), ground)


FIVE = [
    bar("red", 0, 9.7, "white"),
    bar("blue", 4, 13.3, "black"),
    bar("yellow", 5, 9.7, "grey"),
    bar("green", 7, 13.3, "white"),
    bar("purple", 2, 13.3, "grey"),
]


def show(folder: Path) -> None:
    """The five pictures, each with every way to say it."""
    folder.mkdir(parents=True)
    for number, scene in enumerate(FIVE):
        Image.fromarray(rendering.render(scene)).save(folder / f"{number}.png")
        (folder / f"{number}.json").write_text(json.dumps({"captions": wording.captions(scene)}))


def old(count: int, first: int) -> list[str]:
    """A caption of each of so many scenes of the four shapes."""
    return [Random(i).choice(wording.captions(scenes.scene(first + i))) for i in range(count)]
