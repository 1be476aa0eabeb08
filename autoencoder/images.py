"""Range conversion: uint8 pictures <-> float images in [-1, 1]; grey and RGBA for networks that see RGB."""

from __future__ import annotations

import torch
from torch import Tensor


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]: p / 127.5 − 1. ValueError for another dtype."""
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8, got {pixels.dtype}.")
    return pixels.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """finite images in [-1, 1] -> uint8, rounded and clipped; undoes `to_unit` exactly."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def as_rgb(images: Tensor) -> Tensor:
    """What networks trained on RGB are shown of images (B, C, H, W), uint8 or in [-1, 1]: (B, 3, H, W).

    C = 1: grey, repeated. C = 4: RGBA laid on white, c a + (1 − a) with a = (alpha + 1) / 2. Any other C: as they are.
    """
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    if images.shape[1] != 4:
        return images
    if images.dtype == torch.uint8:
        return to_uint8(as_rgb(to_unit(images)))
    alpha = (images[:, 3:] + 1) / 2
    return images[:, :3] * alpha + (1 - alpha)
