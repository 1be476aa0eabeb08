"""The picture of a scene at any resolution: coverage of each pixel by supersampling, object over object."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from training.shapes.scenes import BACKGROUNDS, COLOURS, CROSS_ARM, SHAPES, UNIT, Scene

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
SUPERSAMPLES = 4


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
