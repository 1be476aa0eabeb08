"""Scenes to edit: each is shown as it is, and said as it shall be, which differs in one object."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from numpy.typing import NDArray

from training.shapes.rendering import Bytes, render
from training.shapes.scenes import COLOURS, GAP, HELD_OUT, SHAPES, UNIT, Object, Scene, scene
from training.shapes.wording import captions


@dataclass(frozen=True)
class Edit:
    """From `source` to `target`: the object at `place` is another, all others are the same."""

    source: Scene
    target: Scene
    place: int

    @property
    def words(self) -> tuple[str, str]:
        """The captions of source and target that say everything, in the same words but for the object's."""
        return captions(self.source)[0], captions(self.target)[0]

    @property
    def fewest_words(self) -> tuple[str, str]:
        """The shortest captions: no size and no background, and one object's position or two objects' relation."""
        every = captions(self.source)
        index = every.index(min(every, key=len))
        return every[index], captions(self.target)[index]

    def picture(self, side: int) -> Bytes:
        """The source, (side, side, 3)."""
        return render(self.source, side)

    def hole(self, side: int) -> NDArray[np.bool_]:
        """(side, side), True over the bounding square of the object that changes and the gap that is kept around it."""
        return hole(self.source.objects[self.place], side)


def hole(item: Object, side: int) -> NDArray[np.bool_]:
    """(side, side), True on whole pixels within `GAP` of an object's bounding square: other objects lie outside."""
    reach, mask = item.extent / 2 + GAP / UNIT, np.zeros((side, side), dtype=bool)
    rows, columns = (
        slice(max(0, math.ceil((centre - reach) * side)), min(side, math.floor((centre + reach) * side)))
        for centre in (item.y, item.x)
    )
    mask[rows, columns] = True
    return mask


def another_object(seed: int, objects: int, held_out: bool = True) -> Edit:
    """Source and target differ in colour and shape of one object; size and position are the same. The target's pair is
    one of the held out, or, as the source's, one of training."""
    target, rng = scene(seed, objects=objects, held_out=held_out), Random(f"another object {seed} {objects}")
    place = int(rng.random() * objects)
    if held_out:
        place = next(i for i, item in enumerate(target.objects) if (item.colour, item.shape) in HELD_OUT)
    item, taken = target.objects[place], {(other.colour, other.shape) for other in target.objects}
    pairs = [(colour, shape) for shape in SHAPES for colour in COLOURS
             if shape != item.shape and colour != item.colour and (colour, shape) not in taken.union(HELD_OUT)]
    colour, shape = pairs[int(rng.random() * len(pairs))]
    return Edit(_with(target, place, replace(item, colour=colour, shape=shape)), target, place)


def another_colour(seed: int, objects: int) -> Edit:
    """The target differs in the colour of one object; neither scene has a held-out pair."""
    source, rng = scene(seed, objects=objects), Random(f"another colour {seed} {objects}")
    place = int(rng.random() * objects)
    item, taken = source.objects[place], {(other.colour, other.shape) for other in source.objects}
    colours = [colour for colour in COLOURS if (colour, item.shape) not in taken.union(HELD_OUT)]
    colour = colours[int(rng.random() * len(colours))]
    return Edit(source, _with(source, place, replace(item, colour=colour)), place)


def _with(old: Scene, place: int, item: Object) -> Scene:
    return replace(old, objects=(*old.objects[:place], item, *old.objects[place + 1 :]))
