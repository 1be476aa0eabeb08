"""Reads a picture of shapes back by rules and says how far it obeys its caption.

The background is what most of the border shows; objects are connected regions that differ from it; an object's colour
is the palette's nearest to the median of its inner pixels; its shape is the template of equal area and centroid that
overlaps it best. Lengths are in thirty-seconds of the side, as in `training.shapes`. Larger pictures are first averaged
down to 32-63 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.shapes.rendering import Bytes, Floats, coverage
from training.shapes.scenes import AREA, BACKGROUNDS, COLOURS, POSITIONS, SHAPES, UNIT
from training.shapes.wording import Spec, Wanted, parse

UNKNOWN = "unknown"
CONTRAST = 50.0  # a pixel this far (RGB, 0-255) from the background may belong to an object
COLOUR_REACH = 90.0  # a colour farther than this from every palette entry has no name
SMALLEST = 12.0  # regions of less area (square thirty-seconds) are specks, not objects; a small triangle has 40
OVERLAP = 0.70  # soft intersection over union below which a region is no known shape
LARGE = 11.1 / UNIT  # the side from which an object counts as large (small is at most 10, large at least 12.2)
THIRDS = (11.5 / UNIT, 20.5 / UNIT)  # midway between the generator's cells
MOST = 6  # objects considered when matching: more is wrong in any case


@dataclass(frozen=True)
class Seen:
    """One object found: `position` is the centre (x, y) of its bounding square and `extent` its side, as fractions of
    the picture's side."""

    shape: str
    colour: str
    size: str
    position: tuple[float, float]
    extent: float

    @property
    def cell(self) -> str:
        """The named cell the centre lies in."""
        column, row = (sum(value >= edge for edge in THIRDS) for value in self.position)
        return POSITIONS[3 * row + column]


def _nearest(colour: Floats, palette: dict[str, tuple[int, int, int]], reach: float) -> str:
    """The palette's nearest name, or "unknown" where it is farther than `reach`."""
    distances = np.linalg.norm(np.array(list(palette.values())) - colour, axis=1)
    return list(palette)[int(distances.argmin())] if distances.min() <= reach else UNKNOWN


def _reduced(image: Bytes) -> Floats:
    """The picture as floats, averaged over whole blocks down to 32-63 pixels."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise ValueError(f"expected a square uint8 picture (H, H, 3), got {image.dtype} {image.shape}")
    factor = max(1, image.shape[0] // int(UNIT))
    side = image.shape[0] // factor
    blocks = image[: side * factor, : side * factor].reshape(side, factor, side, factor, 3)
    means: Floats = blocks.mean(axis=(1, 3))
    return means


def _background(picture: Floats) -> Floats:
    """The median of the border pixels that belong to the background most of them are nearest to."""
    border = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])
    palette = np.array(list(BACKGROUNDS.values()))
    nearest = np.linalg.norm(border[:, None] - palette, axis=2).argmin(axis=1)
    majority: Floats = np.median(border[nearest == np.bincount(nearest).argmax()], axis=0)
    return majority


def background(image: Bytes) -> str:
    """The name of the picture's background, or "unknown"."""
    return _nearest(_background(_reduced(image)), BACKGROUNDS, CONTRAST)


def _shifted(values: NDArray[Any], radius: int, axis: int) -> Iterator[NDArray[Any]]:
    """`values` moved by -radius … radius along an axis, zeros moving in."""
    pad = [(radius, radius) if i == axis else (0, 0) for i in range(2)]
    padded, size = np.pad(values, pad), values.shape[axis]
    for start in range(2 * radius + 1):
        yield padded.take(range(start, start + size), axis=axis)


def _spread(values: NDArray[Any], radius: int) -> NDArray[Any]:
    """The greatest value in the square of side 2 radius + 1 around each pixel."""
    for axis in (0, 1):
        values = np.maximum.reduce(list(_shifted(values, radius, axis)))
    return values


def _blurred(values: Floats) -> Floats:
    """The mean over 3x3 pixels."""
    for axis in (0, 1):
        values = np.add.reduce(list(_shifted(values, 1, axis))) / 3
    return values


def _label(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Connected regions (by edges): 0 outside the mask, one positive number in each region."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        neighbours = labels.copy()
        neighbours[1:] = np.maximum(neighbours[1:], labels[:-1])
        neighbours[:-1] = np.maximum(neighbours[:-1], labels[1:])
        neighbours[:, 1:] = np.maximum(neighbours[:, 1:], labels[:, :-1])
        neighbours[:, :-1] = np.maximum(neighbours[:, :-1], labels[:, 1:])
        neighbours *= mask
        if np.array_equal(neighbours, labels):
            return labels
        labels = neighbours


def _fit(alpha: Floats, corner: tuple[int, int]) -> tuple[str, tuple[float, float], float]:
    """The shape, centre and side (pixels) of the template that best overlaps `alpha`, whose first pixel is `corner`
    (left, top).

    Each template takes the area and centroid of `alpha`, sharp or blurred, so only the outline decides.
    """
    left, top = corner
    height, width = alpha.shape
    area = alpha.sum()
    x = left + float((alpha.sum(axis=0) * (np.arange(width) + 0.5)).sum() / area)
    y = top + float((alpha.sum(axis=1) * (np.arange(height) + 0.5)).sum() / area)
    best, fit = -1.0, (UNKNOWN, (x, y), math.sqrt(area))
    for shape in SHAPES:
        extent = math.sqrt(area / AREA[shape])
        centre = (
            (x, y - extent / 6) if shape == "triangle" else (x, y)
        )  # a triangle's centroid lies a third above its base
        sharp = coverage(shape, centre, extent, (left, top, left + width, top + height))
        for template in (sharp, _blurred(sharp)):
            overlap = float(np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum())
            if overlap > best:
                best, fit = overlap, (shape if overlap >= OVERLAP else UNKNOWN, centre, extent)
    return fit


def _distinct(distance: Floats) -> NDArray[np.bool_]:
    """Where the distance from the background is an object's: beyond half the local contrast, the edge of a blurred
    object whatever its colour."""
    return (distance > CONTRAST) & (distance >= 0.5 * _spread(distance, round(2 * len(distance) / UNIT)))


def silhouette(image: Bytes) -> NDArray[np.bool_]:
    """Where a square picture (H, H, 3) uint8, averaged down to 32-63 pixels, shows objects and not its background."""
    picture = _reduced(image)
    return _distinct(np.linalg.norm(picture - _background(picture), axis=2))


def overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Intersection over union of two silhouettes; 1 where both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def read(image: Bytes) -> list[Seen]:
    """The objects in a square picture (H, H, 3) uint8, largest first. Raises ValueError for other arrays."""
    picture = _reduced(image)
    side = len(picture)
    scale = side / UNIT
    ground = _background(picture)
    distance = np.linalg.norm(picture - ground, axis=2)
    labels = _label(_distinct(distance))
    numbers, areas = np.unique(labels[labels > 0], return_counts=True)
    order = [int(numbers[i]) for i in np.argsort(-areas, kind="stable") if areas[i] >= SMALLEST * scale**2]
    return [_see(picture, ground, distance, labels == number, side) for number in order]


def _see(picture: Floats, ground: Floats, distance: Floats, region: NDArray[np.bool_], side: int) -> Seen:
    """One region's object."""
    core = region & (distance >= 0.8 * np.percentile(distance[region], 90))
    colour = np.median(picture[core], axis=0)
    rim = round(side / UNIT)
    own = _spread(region, rim)  # soft edges lie one pixel outside; beyond that begins the neighbour
    axis = colour - ground
    alpha = np.clip((picture - ground) @ axis / (axis @ axis), 0, 1) * own
    rows, columns = np.flatnonzero(own.any(axis=1)), np.flatnonzero(own.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    shape, (x, y), extent = _fit(alpha[top:bottom, left:right], (int(left), int(top)))
    size = "large" if extent / side >= LARGE else "small"
    return Seen(shape, _nearest(colour, COLOURS, COLOUR_REACH), size, (x / side, y / side), extent / side)


def _related(a: Seen, b: Seen, relation: str) -> bool:
    """Whether the first stands in `relation` to the second: the offset's longer component points that way."""
    dx, dy = b.position[0] - a.position[0], b.position[1] - a.position[1]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return abs(along) > abs(across) and (along > 0) == (relation in ("left of", "above"))


def _compare(spec: Spec, objects: tuple[Seen, ...]) -> dict[str, bool]:
    """Each thing the caption says, true or false, with `objects` in the order of the caption's objects."""
    pairs: list[tuple[Wanted, Seen]] = list(zip(spec.objects, objects, strict=False))
    complete = len(pairs) == len(spec.objects)
    result = {
        "shape": complete and all(target.shape == visible.shape for target, visible in pairs),
        "colour": complete and all(target.colour == visible.colour for target, visible in pairs),
    }
    if spec.relation is None:
        result["position"] = complete and all(target.position == visible.cell for target, visible in pairs)
    else:
        result["relation"] = complete and _related(objects[0], objects[1], spec.relation)
    if spec.objects[0].size is not None:
        result["size"] = complete and all(target.size == visible.size for target, visible in pairs)
    return result


def check(image: Bytes, caption: str) -> dict[str, bool]:
    """How far a picture (H, H, 3) uint8 obeys a caption of `training.shapes`.

    Keys: `shape`, `colour`, `count` (exactly as many objects), `position` (one and three objects) or `relation` (two),
    `size` and `background` where the caption says them, and `obeyed`: shape, colour, position or relation, and count
    together. The objects found are matched to those wanted so that most holds. Raises ValueError for captions no
    template makes.
    """
    spec, seen = parse(caption), read(image)
    count = len(seen) == len(spec.objects)
    orders = permutations(seen[:MOST], min(len(spec.objects), len(seen)))
    result = max((_compare(spec, order) for order in orders), key=_merit)
    must = ("shape", "colour", "position" if spec.relation is None else "relation")
    result |= {"count": count, "obeyed": count and all(result[key] for key in must)}
    if spec.background is not None:
        result["background"] = background(image) == spec.background
    return result


def _merit(result: dict[str, bool]) -> tuple[bool, int]:
    """Orders matchings: first those that obey in everything but size, then by how much holds."""
    return all(value for key, value in result.items() if key != "size"), sum(result.values())
