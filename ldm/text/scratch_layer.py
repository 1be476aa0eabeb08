"""A layer of the text transformer that learns with the denoiser, which hears from the first steps what stands where."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.backbones.attention import FeedForward, SelfAttention, zero


def first_biases(heads: int, length: int) -> Tensor:
    """What heads begin with (heads, 2 length - 1), over key minus query from 1 - length: even heads look ahead, odd
    ones back, and pairs by turns at one word and at all of their side.

    At one: 0 at the next (then the second next ...), falling by 2 a word. At all: 0 at the next, falling by 0.4 a word
    (then 0.2 ...). -5 elsewhere.
    """
    rows = []
    for head in range(heads):
        side, (turn, wide) = (-1) ** head * torch.arange(1.0 - length, length), divmod(head // 2, 2)
        every = torch.where(side > 0, (1 - side) * 0.4 / (1 + turn), -5.0)
        rows.append(every if wide else -2 * (side - 1 - turn).abs())
    return torch.stack(rows).clamp(min=-5)


class ScratchLayer(nn.Module):
    """x + attention(norm x), then + mlp(norm x); attention adds a learned bias per head and distance (T5's).

    It begins with `first_biases`, and with values and output that keep lengths: each word says from the first steps
    what stands beside it, before it and after it. From words that say themselves alone, which of them belong together
    ("red circle above a blue square") is learnt later.
    """

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width), SelfAttention(width, heads)
        self.norm_2, self.mlp = nn.LayerNorm(width), FeedForward(width, 4 * width)
        nn.init.orthogonal_(self.attention.qkv.weight[2 * width :])
        nn.init.orthogonal_(self.attention.out.weight)
        zero(self.mlp.out)
        place = torch.arange(length)
        self.register_buffer("distance", place - place[:, None] + length - 1, persistent=False)  # an index into bias
        self.bias = nn.Parameter(first_biases(heads, length))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, width), mask (B, 1, 1, L) -> (B, L, width)."""
        bias = self.bias[:, self.get_buffer("distance")].masked_fill(~mask, -torch.inf)
        x = x + self.attention(self.norm_1(x), bias)
        y: Tensor = x + self.mlp(self.norm_2(x))
        return y
