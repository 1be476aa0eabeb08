"""How a noise level and pooled text reach a transformer's blocks: shifts, scales and gates of normalised tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OwnModulation(nn.Module):
    """adaLN-zero: a block's own linear map of silu(embedding) (B, D) to shifts, scales and gates (B, parts, D)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, parts * width)
        self.parts = parts

    def forward(self, embedding: Tensor) -> Tensor:
        parts: Tensor = self.linear(embedding)
        return parts.view(embedding.shape[0], self.parts, -1)  # not len: an exported batch may be of any size


class TableModulation(nn.Module):
    """adaLN-single: a block's own table (parts, D) added to what all blocks share (B, parts or 1, D)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(parts, width))

    def forward(self, shared: Tensor) -> Tensor:
        return self.table + shared


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift; x (B, N, D), shift and scale (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


MODULATIONS: dict[str, type[nn.Module]] = {"adaln-zero": OwnModulation, "adaln-single": TableModulation}
