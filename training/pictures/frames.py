"""How a packed picture was cut: the size of the one it came from, and where in it, scaled, it begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

FRAME = "frame"  # in a sample's metadata


class Frame(NamedTuple):
    """`original`: height and width of the upright picture; `crop`: rows and columns cut off above and to the left of
    it, scaled; `size`: height and width of what was kept. All in pixels."""

    original: tuple[int, int]
    crop: tuple[int, int]
    size: tuple[int, int]

    def mirrored(self) -> Frame:
        """That of the mirrored picture: what was cut off to the right is to the left."""
        (height, width), (rows, columns) = self.original, self.size
        scaled = width * max(rows / height, columns / width)
        return self._replace(crop=(self.crop[0], max(0, round(scaled - columns) - self.crop[1])))

    @property
    def kept(self) -> float:
        """The share of the picture's area that was kept."""
        (height, width), (rows, columns) = self.original, self.size
        scale = max(rows / height, columns / width)
        return rows * columns / (height * width * scale**2)

    def numbers(self) -> tuple[int, ...]:
        """(original height, original width, crop top, crop left, height, width): what `Cond.extras["size"]` holds."""
        return *self.original, *self.crop, *self.size


def frame_of(size: tuple[int, int], target: tuple[int, int], box: tuple[float, float, float, float]) -> Frame:
    """The frame of a picture of `size` (width, height) whose `box` (left, top, right, bottom) was scaled to `target`
    (height, width)."""
    scale = target[0] / (box[3] - box[1])
    return Frame((size[1], size[0]), (round(box[1] * scale), round(box[0] * scale)), target)


def stored_frame(notes: Mapping[str, Any]) -> Frame | None:
    """The frame in a sample's metadata; None where it holds none, or no sound one."""
    parts = notes.get(FRAME)
    if not isinstance(parts, Mapping):
        return None
    pairs = [parts.get(name) for name in Frame._fields]
    if not all(isinstance(pair, list) and [type(side) for side in pair] == [int, int] for pair in pairs):
        return None
    original, crop, size = ((pair[0], pair[1]) for pair in pairs if isinstance(pair, list))
    return Frame(original, crop, size) if min(*original, *size) > 0 and min(crop) >= 0 else None
