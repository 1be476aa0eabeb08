"""Captioned pictures of simple shapes: the picture of a scene, every way to say it, and what a caption says.

A scene holds one to three objects on a plain background. One object is placed in a named cell ("a small red circle at
the top left on a white background"), two stand in a relation ("a red circle left of a blue square"), three each have
their own cell. Any resolution from 32 up scales everything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from training.scenes import (
    AREA,
    BACKGROUNDS,
    COLOURS,
    COUNT_WEIGHTS,
    CROSS_ARM,
    HELD_OUT,
    INVERSE,
    POSITIONS,
    SHAPES,
    SIZES,
    UNIT,
    Object,
    Scene,
    scene,
)  # fmt: skip

__all__ = [
    "AREA", "BACKGROUNDS", "COLOURS", "COUNT_WEIGHTS", "HELD_OUT", "INVERSE", "POSITIONS", "SHAPES", "SIZES", "UNIT",
    "Bytes", "Floats", "Object", "Scene", "Spec", "Wanted",
    "captions", "choose_captions", "coverage", "held_out_prompts", "inside", "parse", "render", "scene",
]  # fmt: skip

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
SUPERSAMPLES = 4
PATIENCE = 40_000  # scenes in a row that bring no new caption, after which there are none left


@dataclass(frozen=True)
class Wanted:
    """What a caption says of one object; None where it says nothing."""

    shape: str
    colour: str
    size: str | None = None
    position: str | None = None


@dataclass(frozen=True)
class Spec:
    """What a caption says: the inverse of every template."""

    objects: tuple[Wanted, ...]
    background: str | None = None
    relation: str | None = None


# --- pictures ----------------------------------------------------------------------------------------------------


def inside(shape: str, u: Floats, v: Floats) -> NDArray[np.bool_]:
    """Whether points (u to the right, v down, in [-1, 1] over the bounding square; broadcast together) lie in the
    shape."""
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "square":
        return (abs(u) <= 1) & (abs(v) <= 1)
    if shape == "triangle":  # the tip above, base as wide as the square
        return (abs(u) <= (v + 1) / 2) & (v <= 1)
    if shape == "cross":
        arm_u, arm_v = abs(u) <= CROSS_ARM, abs(v) <= CROSS_ARM
        return (arm_u & (abs(v) <= 1)) | (arm_v & (abs(u) <= 1))
    raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")


def coverage(shape: str, centre: tuple[float, float], extent: float, window: tuple[int, int, int, int]) -> Floats:
    """The share (rows, columns) of each pixel of `window` (left, top, right, bottom) that the shape covers; lengths in
    pixels."""
    left, top, right, bottom = window
    step = (np.arange(SUPERSAMPLES) + 0.5) / SUPERSAMPLES
    u = ((np.arange(left, right)[:, None] + step).ravel()[None, :] - centre[0]) * (2 / extent)
    v = ((np.arange(top, bottom)[:, None] + step).ravel()[:, None] - centre[1]) * (2 / extent)
    blocks = inside(shape, u, v).reshape(bottom - top, SUPERSAMPLES, right - left, SUPERSAMPLES)
    share: Floats = blocks.mean(axis=(1, 3), dtype=np.float64)
    return share


def render(scene: Scene, resolution: int = 32) -> Bytes:
    """The anti-aliased picture (resolution, resolution, 3), uint8. Raises ValueError below 32 pixels."""
    if resolution < UNIT:
        raise ValueError(f"resolution must be at least 32 for shapes to be recognisable (got {resolution})")
    picture = np.full((resolution, resolution, 3), BACKGROUNDS[scene.background], dtype=np.float64)
    for item in scene.objects:
        x, y, extent = item.x * resolution, item.y * resolution, item.extent * resolution
        left, top = math.floor(x - extent / 2), math.floor(y - extent / 2)
        right, bottom = math.ceil(x + extent / 2), math.ceil(y + extent / 2)
        alpha = coverage(item.shape, (x, y), extent, (left, top, right, bottom))[:, :, None]
        patch = picture[top:bottom, left:right]
        patch += alpha * (np.array(COLOURS[item.colour]) - patch)
    return (picture + 0.5).astype(np.uint8)


# --- captions ----------------------------------------------------------------------------------------------------

FRAMES = (  # the background said or not; the first is the canonical one
    "{body} on a {background} background",
    "on a {background} background, {body}",
    "a {background} picture with {body}",
    "{body}",
    "a picture of {body}",
)


def _noun(item: Object, sized: bool) -> str:
    words = f"{item.size} {item.colour} {item.shape}" if sized else f"{item.colour} {item.shape}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _bodies(scene: Scene, sized: bool) -> Iterator[str]:
    nouns = [_noun(item, sized) for item in scene.objects]
    if scene.relation:
        for (a, b), relation in ((nouns, scene.relation), (nouns[::-1], INVERSE[scene.relation])):
            yield f"{a} {relation} {b}"
            if relation.endswith(" of"):
                yield f"{a} to the {relation} {b}"
        return
    for word in ("at", "in"):
        placed = [f"{noun} {word} the {item.position}" for noun, item in zip(nouns, scene.objects, strict=True)]
        yield placed[0] if len(placed) == 1 else f"{', '.join(placed[:-1])} and {placed[-1]}"


def captions(scene: Scene) -> tuple[str, ...]:
    """Every way to say the scene, the canonical one (everything said) first; all different."""
    said = (
        frame.format(body=body, background=scene.background)
        for sized in (True, False)
        for frame in FRAMES
        for body in _bodies(scene, sized)
    )
    return tuple(said)


def choose_captions(scene: Scene, count: int, seed: int) -> tuple[str, ...]:
    """`count` different captions of the scene, drawn by a seed."""
    return tuple(Random(f"captions {seed}").sample(captions(scene), count))


def held_out_prompts(count: int, objects: int, seed: int = 0) -> list[str]:
    """`count` different captions of scenes that contain a held-out (colour, shape) pair, all with `objects` objects.

    Raises ValueError where there are not so many: one object can be said in 2,376 ways.
    """
    prompts: dict[str, int] = {}  # each with the number of the scene that brought it
    number = newest = 0
    while len(prompts) < count:
        if number - newest > PATIENCE:
            raise ValueError(f"{count} held-out captions of {objects} objects asked for, there are {len(prompts)}")
        key = seed * 1_000_003 + number
        said = choose_captions(scene(key, objects=objects, held_out=True), 1, key)[0]
        newest = number if prompts.setdefault(said, number) == number else newest
        number += 1
    return list(prompts)


_ITEM = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CELLS = "|".join(sorted(POSITIONS, key=len, reverse=True))
_PLACED = re.compile(rf"{_ITEM} (?:at|in) the ({_CELLS})")
_RELATED = re.compile(rf"{_ITEM} (?:to the )?({'|'.join(INVERSE)}) {_ITEM}")
_FRAMES = tuple(
    re.compile(
        re.escape(frame)
        .replace(r"\{body\}", "(?P<body>.+)")
        .replace(r"\{background\}", f"(?P<background>{'|'.join(BACKGROUNDS)})")
    )
    for frame in (*FRAMES[:3], FRAMES[4], FRAMES[3])
)


def parse(caption: str) -> Spec:
    """What a caption says; the inverse of every template. Raises ValueError for captions that no template makes."""
    for frame in _FRAMES:
        if framed := frame.fullmatch(caption):
            break
    else:
        raise ValueError(f"not a caption of shapes: {caption!r}")
    said = framed.groupdict()
    if related := _RELATED.fullmatch(said["body"]):
        size_a, colour_a, shape_a, relation, size_b, colour_b, shape_b = related.groups()
        pair = (Wanted(shape_a, colour_a, size_a), Wanted(shape_b, colour_b, size_b))
        return Spec(pair, said.get("background"), relation)
    listed = [_PLACED.fullmatch(part) for part in re.split(r", | and ", said["body"])]
    if len(listed) not in (1, 3) or not all(listed):
        raise ValueError(f"not a caption of shapes: {caption!r}")
    items = [match.groups() for match in listed if match]
    return Spec(
        tuple(Wanted(shape, colour, size, place) for size, colour, shape, place in items), said.get("background")
    )
