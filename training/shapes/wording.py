"""Captioned pictures of simple shapes: the picture of a scene, every way to say it, and what a caption says.

A scene holds one to three objects on a plain background. One object is placed in a named cell ("a small red circle at
the top left on a white background"), two stand in a relation ("a red circle left of a blue square"), three each have
their own cell. Any resolution from 32 up scales everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from training.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    INVERSE,
    POSITIONS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    scene,
)  # fmt: skip

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
    sentences = (
        frame.format(body=body, background=scene.background)
        for sized in (True, False)
        for frame in FRAMES
        for body in _bodies(scene, sized)
    )
    return tuple(sentences)


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
    parts = framed.groupdict()
    if related := _RELATED.fullmatch(parts["body"]):
        size_a, colour_a, shape_a, relation, size_b, colour_b, shape_b = related.groups()
        pair = (Wanted(shape_a, colour_a, size_a), Wanted(shape_b, colour_b, size_b))
        return Spec(pair, parts.get("background"), relation)
    matches = [_PLACED.fullmatch(part) for part in re.split(r", | and ", parts["body"])]
    if len(matches) not in (1, 3) or not all(matches):
        raise ValueError(f"not a caption of shapes: {caption!r}")
    items = [match.groups() for match in matches if match]
    return Spec(
        tuple(Wanted(shape, colour, size, place) for size, colour, shape, place in items), parts.get("background")
    )
