"""What a U-Net's levels are made of: resnets, text transformers, and the change of size between levels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.backbones.attention import GEGLU, attend, zero
from ldm.backbones.embed import sincos_table
from ldm.conditioning import Parts, Share

EXTENT = 32.0  # tokens that a position table covers, whatever the size


class Given(NamedTuple):
    """What all layers read: silu of the time embedding (B, T), text (B, L, D), its mask (B, 1, 1, L), `Cond.share`."""

    active_time: Tensor
    context: Tensor
    mask: Tensor | None
    share: Share


class ResnetBlock(nn.Module):
    """skip(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + linear(silu(time))))); the branch starts at zero.
    With `scale_shift` the linear layer gives (scale, shift), and norm2(h) (1 + scale) + shift goes on."""

    def __init__(self, inputs: int, outputs: int, time_dim: int, groups: int, scale_shift: bool) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-5)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, 2 * outputs if scale_shift else outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-5)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        zero(self.conv2)

    def forward(self, x: Tensor, active_time: Tensor) -> Tensor:
        """x (B, inputs, H, W), silu of the time embedding (B, time_dim) -> (B, outputs, H, W)."""
        h, time = self.conv1(F.silu(self.norm1(x))), self.time_emb_proj(active_time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + time)
        y: Tensor = self.conv_shortcut(x) + self.conv2(F.silu(h))
        return y


class Attention(nn.Module):
    """Attention of x (B, N, width) over a context (B, L, context_dim), itself where that is x."""

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, shared: Parts) -> Tensor:
        projected = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in projected)
        y: Tensor = self.to_out[0](attend(q, k, v, mask, shared))
        return y


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention to the text and a gated feed-forward, each on a normalised residual."""

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, context_dim, heads)
        # net.1 is the place of diffusers' dropout: it keeps the published key net.2
        net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, share: Share,
                place: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y, None, share.own)
        y = self.norm2(x)
        x = x + self.attn2(y if place is None else y + place, context, mask, share.cross)
        x = x + self.ff["net"](self.norm3(x))
        return x


class SpatialTransformer(nn.Module):
    """A residual transformer over the pixels of a feature map; it starts as the identity. With `query_position` a fixed
    table of positions joins what each of them asks of the text."""

    def __init__(self, width: int, context_dim: int, heads: int, depth: int, groups: int, linear: bool,
                 query_position: bool = False) -> None:
        super().__init__()
        self.query_position = query_position
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(TransformerLayer(width, context_dim, heads) for _ in range(depth))
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        zero(self.proj_out)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, share: Share) -> Tensor:
        """x (B, width, H, W), context (B, L, context_dim), mask (B, 1, 1, L) -> (B, width, H, W)."""
        tokens = _pointwise(self.proj_in, self.norm(x).flatten(2).transpose(1, 2))
        place = None
        if self.query_position:
            place = sincos_table(x.shape[1], x.shape[2], x.shape[3], EXTENT, x.device).to(tokens.dtype)
        for layer in self.transformer_blocks:
            tokens = layer(tokens, context, mask, share, place)
        return x + _pointwise(self.proj_out, tokens).transpose(1, 2).reshape(x.shape)


def _pointwise(layer: nn.Linear | nn.Conv2d, tokens: Tensor) -> Tensor:
    """A linear layer, or the same thing stored as a 1x1 convolution, on tokens (B, N, D)."""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


class Resample(nn.Module):
    """Halves the size (strided convolution) or doubles it (nearest neighbour, then convolution)."""

    def __init__(self, width: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)
        return y
