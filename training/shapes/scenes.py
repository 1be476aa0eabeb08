"""Scenes of one to three simple shapes, drawn by a seed: what is in them and where. `training.shapes` shows and says
them.

All lengths here are thirty-seconds of the picture's side, that is pixels at 32x32.

`HELD_OUT` names the (colour, shape) pairs that training scenes never contain: a model that draws them has learnt to
combine. Randomness is the standard library's Mersenne Twister keyed by text, the same on every platform and version.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import TypeVar

T = TypeVar("T")

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (210, 20, 30),
    "orange": (240, 120, 0),
    "yellow": (255, 235, 0),
    "green": (0, 150, 60),
    "cyan": (0, 200, 230),
    "blue": (30, 60, 220),
    "purple": (150, 40, 180),
    "pink": (255, 120, 190),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}
SIZES = {"small": (9.4, 10.0), "large": (13.0, 13.6)}  # the side of the bounding square, drawn uniformly in the range
POSITIONS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HELD_OUT = (("green", "circle"), ("yellow", "square"), ("blue", "triangle"), ("red", "cross"))
COUNT_WEIGHTS = (0.35, 0.45, 0.20)  # of scenes with one, two and three objects

UNIT = 32.0  # lengths are in thirty-seconds of the side
MARGIN = 1.0  # from the border: the outermost pixels are always background
GAP = 2.0  # between two bounding squares
CENTRES = (8.0, 16.0, 24.0)  # of left / centre / right (top / … / bottom)
JITTER = 1.0  # a centre lies at most this far from its cell's, along each axis
SLANT = 4.0  # a relation's objects lie at most this far from the middle line, so only one relation is true of them
CROSS_ARM = 1 / 3  # width of a cross's arms over its side
AREA = {
    "circle": math.pi / 4,
    "square": 1.0,
    "triangle": 0.5,
    "cross": CROSS_ARM * (2 - CROSS_ARM),
}  # over the bounding square's


@dataclass(frozen=True)
class Object:
    """One object: what is said of it, and where it is (centre x, y and side of its bounding square, as fractions of the
    picture's side)."""

    shape: str
    colour: str
    size: str
    position: str | None  # the named cell; None where a relation places the object
    x: float
    y: float
    extent: float


@dataclass(frozen=True)
class Scene:
    """Objects on a background; with two objects, `relation` of the first to the second."""

    objects: tuple[Object, ...]
    background: str
    relation: str | None = None


def _pick(rng: Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _between(rng: Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


@lru_cache
def _pairs() -> tuple[tuple[str, str], ...]:
    return tuple((colour, shape) for shape in SHAPES for colour in COLOURS if (colour, shape) not in HELD_OUT)


def _draw_pairs(rng: Random, count: int, held_out: bool) -> list[tuple[str, str]]:
    """`count` different (colour, shape) pairs, exactly one of them held out if asked, at a random place."""
    pairs: list[tuple[str, str]] = [_pick(rng, HELD_OUT)] if held_out else []
    while len(pairs) < count:
        pair = _pick(rng, _pairs())
        if pair not in pairs:
            pairs.insert(int(rng.random() * (len(pairs) + 1)), pair)
    return pairs


def _draw_size(rng: Random) -> tuple[str, float]:
    name = _pick(rng, tuple(SIZES))
    return name, _between(rng, *SIZES[name])


def _in_cell(rng: Random, position: int, extent: float) -> tuple[float, float]:
    """A jittered centre in the cell, with the object inside the margin."""
    x, y = (_near(rng, CENTRES[cell], JITTER, extent) for cell in (position % 3, position // 3))
    return x, y


def _near(rng: Random, centre: float, reach: float, extent: float) -> float:
    """A coordinate within `reach` of `centre` that keeps an object of this extent inside the margin."""
    low, high = MARGIN + extent / 2, UNIT - MARGIN - extent / 2
    return _between(rng, max(low, centre - reach), min(high, centre + reach))


def _apart(a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    """Whether two (x, y, extent) leave the gap free along one of the axes."""
    return max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= (a[2] + b[2]) / 2 + GAP


def _draw_cells(rng: Random, count: int) -> list[tuple[str, str, tuple[float, float, float]]]:
    """`count` objects (size, position, place) in different cells, drawn again until none come close to touching."""
    while True:
        cells: list[int] = []
        while len(cells) < count:
            cell = int(rng.random() * len(POSITIONS))
            if cell not in cells:
                cells.append(cell)
        sizes = [_draw_size(rng) for _ in cells]
        places = [(*_in_cell(rng, cell, extent), extent) for cell, (_, extent) in zip(cells, sizes, strict=True)]
        if all(_apart(a, b) for i, a in enumerate(places) for b in places[:i]):
            return [(size[0], POSITIONS[cell], place) for cell, size, place in zip(cells, sizes, places, strict=True)]


def _draw_related(rng: Random, relation: str) -> list[tuple[str, None, tuple[float, float, float]]]:
    """Two objects, the first in `relation` to the second, clearly along one axis."""
    (size_a, extent_a), (size_b, extent_b) = _draw_size(rng), _draw_size(rng)
    while True:
        ends = [(_near(rng, CENTRES[end], JITTER, extent), _near(rng, CENTRES[1], SLANT, extent), extent)
                for end, extent in ((0, extent_a), (2, extent_b))]  # fmt: skip
        if _apart(*ends):
            break
    if relation in ("right of", "below"):
        ends = [(UNIT - x, y, extent) for x, y, extent in ends]
    if relation in ("above", "below"):
        ends = [(y, x, extent) for x, y, extent in ends]
    return [(size_a, None, ends[0]), (size_b, None, ends[1])]


def scene(seed: int, *, objects: int | None = None, held_out: bool = False) -> Scene:
    """The scene of a seed. `objects` fixes the number (1, 2 or 3; by default drawn with `COUNT_WEIGHTS`).

    Without `held_out` no object is a held-out pair; with it exactly one is (for one object: the object itself).

    Raises ValueError where `objects` is not 1, 2 or 3.
    """
    rng = Random(f"shapes {seed} {objects} {held_out}")
    if objects is None:
        draw = rng.random()
        objects = 1 + sum(draw >= edge for edge in (COUNT_WEIGHTS[0], COUNT_WEIGHTS[0] + COUNT_WEIGHTS[1]))
    if objects not in (1, 2, 3):
        raise ValueError(f"objects must be 1, 2 or 3 (got {objects})")
    pairs = _draw_pairs(rng, objects, held_out)
    background = _pick(rng, tuple(BACKGROUNDS))
    relation = _pick(rng, tuple(INVERSE)) if objects == 2 else None
    drawn = _draw_related(rng, relation) if relation else _draw_cells(rng, objects)
    return Scene(
        objects=tuple(
            Object(shape, colour, size, position, *(round(value / UNIT, 6) for value in place))
            for (colour, shape), (size, position, place) in zip(pairs, drawn, strict=True)
        ),
        background=background,
        relation=relation,
    )
