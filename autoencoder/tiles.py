"""Encode and decode pictures of any size in overlapping tiles, so that memory is that of one tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from autoencoder.base import Autoencoder
from autoencoder.precision import double_device


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
    grain_in, grain_out = grain
    height, width = x.shape[2] // grain_in, x.shape[3] // grain_in
    output: Tensor | None = None
    columns = list(_spans(width, tile, overlap, grain_out, double_device(x.device)))
    for top, bottom, down in _spans(height, tile, overlap, grain_out, double_device(x.device)):
        for left, right, across in columns:
            part = call(x[:, :, top * grain_in : bottom * grain_in, left * grain_in : right * grain_in])
            if output is None:
                output = part.new_zeros(*part.shape[:2], height * grain_out, width * grain_out)
            area = output[:, :, top * grain_out : bottom * grain_out, left * grain_out : right * grain_out]
            area += part * (down[:, None] * across).to(part.device, part.dtype)
    assert output is not None
    return output


def _spans(
    size: int, tile: int, overlap: int, grain_out: int, device: torch.device
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, weights (grain_out·(stop − start),)) of the tiles along one axis; the weights sum to 1."""
    count = max(1, math.ceil((size - overlap) / (tile - overlap)))
    starts = [round(i * (size - tile) / max(1, count - 1)) for i in range(count)]
    stops = [min(size, start + tile) for start in starts]
    margin, fade = overlap // 4 * grain_out, (overlap - 2 * (overlap // 4)) * grain_out
    rows = torch.zeros(count, size * grain_out, dtype=torch.float64)
    for row, start, stop in zip(rows, starts, stops, strict=True):
        positions = torch.arange(start * grain_out, stop * grain_out) + 0.5
        weight = torch.ones(len(positions), dtype=torch.float64)
        if start > 0:
            weight *= ((positions - start * grain_out - margin) / max(1, fade)).clamp(0, 1)
        if stop < size:
            weight *= ((stop * grain_out - margin - positions) / max(1, fade)).clamp(0, 1)
        row[start * grain_out : stop * grain_out] = weight
    rows /= rows.sum(0)
    for row, start, stop in zip(rows, starts, stops, strict=True):
        yield start, stop, row[start * grain_out : stop * grain_out].to(device)
