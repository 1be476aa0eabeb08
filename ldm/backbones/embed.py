"""Embeddings of the noise level and of positions, all computed in float32 or better."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.precision import double_device


def sinusoid(level: Tensor, dim: int, max_period: float = 10_000.0, shift: float = 0.0) -> Tensor:
    """Noise levels (B,) -> (B, dim) float32: cos(level f_i), sin(level f_i), f_i = max_period^(-i / (dim/2 - shift)).

    Float32 whatever the autocast, because bfloat16 rounds level 501 to 500 (Vaswani et al. 2017, sec. 3.5).
    """
    half = dim // 2
    order = torch.arange(half, device=level.device, dtype=torch.float32)
    frequencies = torch.exp(order * (-math.log(max_period) / (half - shift)))
    phase = level.float()[:, None] * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=1)


class Projection(nn.Module):
    """linear_2(activation(linear_1(x))) of noise levels, pooled text, caption tokens: (..., inputs) -> (..., width)."""

    def __init__(self, inputs: int, width: int, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear_2(self.activation(self.linear_1(x.to(self.linear_1.weight.dtype))))
        return y


def _axes(of_rows: Tensor, of_columns: Tensor) -> Tensor:
    """Features of rows (h, d) and columns (w, d) -> (h·w, 2d), the columns' first, as in DiT and diffusers."""
    columns, rows = of_columns.expand(len(of_rows), -1, -1), of_rows[:, None].expand(-1, len(of_columns), -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)


def _phases(dim: int, count: int, base: float, device: torch.device) -> Tensor:
    """(count, dim) float64: token i of `count` sits at i·base/count, so any size covers the extent of `base` tokens."""
    order, place = (torch.arange(n, device=double_device(device), dtype=torch.float64) for n in (dim, count))
    return (place * (base / count))[:, None] * 10_000.0 ** (-order / dim)


def sincos_table(dim: int, height: int, width: int, base: float, device: torch.device) -> Tensor:
    """Fixed 2-D position table (height·width, dim) float32, rows scaled by base/height and columns by base/width.

    dim must be divisible by 4. (DiT, Peebles & Xie 2023; the scaling is PixArt-alpha's, sec. 2.4.)
    """
    rows, columns = (_phases(dim // 4, count, base, device) for count in (height, width))
    table = _axes(torch.cat([rows.sin(), rows.cos()], 1), torch.cat([columns.sin(), columns.cos()], 1))
    return table.float().to(device)


def rope_table(head_dim: int, height: int, width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotary table (cos, sin), each (height·width, head_dim) float32: half of the pairs turn with the column, half with
    the row. head_dim must be divisible by 4. (RoFormer, Su et al. 2021, eq. 34, once per axis.)
    """
    rows, columns = (_phases(head_dim // 4, count, base, device) for count in (height, width))
    angle = _axes(rows, columns).repeat(1, 2)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair (x_i, x_{i + d/2}) of x (B, heads, N, d) by its token's angle."""
    cos, sin = (part.to(x.dtype) for part in table)
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([-second, first], dim=-1), sin)


def patches(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> its patches (B, N, C p p), as they are published: C·p·p features go in, p·p·C come out."""
    grid = x.reshape(*x.shape[:2], x.shape[2] // patch, patch, x.shape[3] // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
