"""Encode and decode pictures of any size in overlapping tiles, so that memory is that of one tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from autoencoder.base import Autoencoder


def decode_tiled(model: Autoencoder, latents: Tensor, *, tile: int = 64, overlap: int = 16) -> Tensor:
    """`model.decode` in tiles of at most tile x tile latents: (B, C, h, w) -> images (B, image_channels, f·h, f·w).

    Neighbours share at least `overlap` latents. Of these the outer quarter on either side, where a tile does not see
    its surroundings, is thrown away, and the middle half is blended: the result is that of the whole wherever the
    decoder sees no further than overlap / 4 latents. What has no bounded view (group statistics, attention) differs
    from tile to tile, and the blend spreads the difference over overlap / 2 latents. ValueError unless
    tile > overlap >= 4, or overlap is 0 (tiles side by side).
    """
    model.check_latents(latents)
    return _tiled(model.decode, latents, tile, overlap, (1, model.factor))


def encode_tiled(model: Autoencoder, images: Tensor, *, tile: int = 64, overlap: int = 16) -> Tensor:
    """`model.encode` in tiles of at most tile x tile latents, tile and overlap counted in latents as in `decode_tiled`:
    images (B, image_channels, H, W) -> moments. ValueError as there, and for a size that the factor does not divide.
    """
    model.check_images(images)
    return _tiled(model.encode, images, tile, overlap, (model.factor, 1))


def _tiled(call: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, grain: tuple[int, int]) -> Tensor:
    """Sum of the weighted answers; one cell of the grid is grain[0] elements of x and grain[1] of the answer."""
    if not tile > overlap >= 4 and not tile > overlap == 0:
        raise ValueError(f"tiles need tile > overlap >= 4 or overlap 0, in latents, got {tile} and {overlap}.")
    near, far = grain
    height, width = x.shape[2] // near, x.shape[3] // near
    whole: Tensor | None = None
    columns = list(_spans(width, tile, overlap, far, x.device))
    for top, bottom, down in _spans(height, tile, overlap, far, x.device):
        for left, right, across in columns:
            part = call(x[:, :, top * near : bottom * near, left * near : right * near])
            if whole is None:
                whole = part.new_zeros(*part.shape[:2], height * far, width * far)
            area = whole[:, :, top * far : bottom * far, left * far : right * far]
            area += part * (down[:, None] * across).to(part.dtype)
    assert whole is not None
    return whole


def _spans(size: int, tile: int, overlap: int, far: int, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, weights of the answer (far·(stop − start),)) of the tiles along one axis, weights summing to 1."""
    count = max(1, math.ceil((size - overlap) / (tile - overlap)))
    starts = [round(i * (size - tile) / max(1, count - 1)) for i in range(count)]
    stops = [min(size, start + tile) for start in starts]
    margin, fade = overlap // 4 * far, (overlap - 2 * (overlap // 4)) * far
    rows = torch.zeros(count, size * far, dtype=torch.float64)
    for row, start, stop in zip(rows, starts, stops, strict=True):
        here = torch.arange(start * far, stop * far) + 0.5
        weight = torch.ones(len(here), dtype=torch.float64)
        if start > 0:
            weight *= ((here - start * far - margin) / max(1, fade)).clamp(0, 1)
        if stop < size:
            weight *= ((stop * far - margin - here) / max(1, fade)).clamp(0, 1)
        row[start * far : stop * far] = weight
    rows /= rows.sum(0)
    for row, start, stop in zip(rows, starts, stops, strict=True):
        yield start, stop, row[start * far : stop * far].to(device)
