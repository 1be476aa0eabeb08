"""Range conversion: uint8 pictures <-> float images in [-1, 1]."""

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
