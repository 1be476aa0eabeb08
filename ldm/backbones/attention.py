"""Attention on scaled-dot-product kernels, padding masks, and the feed-forward layers that go with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.backbones.embed import rotate
from ldm.conditioning import Parts


def swiglu(x: Tensor) -> Tensor:
    """silu(a)·b with (a, b) = x (Shazeer 2020, eq. 6)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


# Each with how many times the hidden width it reads.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "gelu": (F.gelu, 1), "gelu-tanh": (partial(F.gelu, approximate="tanh"), 1), "swiglu": (swiglu, 2)}


def blank(context: Tensor, mask: Tensor | None) -> Tensor:
    """Context (B, L, D) with its padding (mask False) set to zero: whatever a padded token held reaches nothing."""
    return context if mask is None else context.masked_fill(~mask[..., None], 0.0)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """Padding mask (B, L), True = real -> (B, 1, 1, L) for attention over that context alone; None stays None.

    A row without one real token would be 0/0: it reads all its tokens, which `blank` has made equal and empty.
    No test on the values, since that would make a GPU wait.
    """
    return None if mask is None else (mask | ~mask.any(dim=1, keepdim=True))[:, None, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shared: Parts = "") -> Tensor:
    """softmax(q kᵀ/√d) v: q (B, heads, N, d), k and v (B, heads, L, d), mask (B, 1, 1, L) -> (B, N, heads·d).

    Odd samples take what is `shared` from the even one before them. With its q and k that is softmax(q_s k_sᵀ/√d) v:
    the map of one picture on the values of the other, by the same kernel.
    """
    if shared:
        k, mask = from_first(k), None if mask is None else from_first(mask)
        q, v = (from_first(q), v) if shared == "qk" else (q, from_first(v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def from_first(x: Tensor) -> Tensor:
    """(B, ...) with the first sample of each pair in the place of both."""
    return x[::2].repeat_interleave(2, dim=0)


class HeadNorm(nn.Module):
    """RMS norm over the channels of a head (Henry et al. 2020), in its input's dtype so that it stays one kernel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


class SelfAttention(nn.Module):
    """Self-attention with one fused projection to q, k, v; optional RMS norm of q and k, rotary positions, and values
    that are mixed with those of the first layer by two learned numbers (Zhou et al. 2024, arXiv 2410.17897, eq. 8)."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False, value_residual: bool = False) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((2,), 0.5)) if value_residual else None
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None,
                shared: Parts = "", first: Tensor | None = None) -> Tensor:
        """x (B, N, width), mask (B, 1, 1, N), rope as `rope_table` gives it, shared as in `attend`, `first` the values
        (B, heads, N, d) of the first layer -> (B, N, width)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.mix is not None and first is not None:
            v = self.mix[0] * v + self.mix[1] * first
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        y: Tensor = self.out(attend(q, k, v, mask, shared))
        return y

    def values(self, x: Tensor) -> Tensor:
        """The values (B, heads, N, d) of x (B, N, width)."""
        width = x.shape[2]
        v = F.linear(x, self.qkv.weight[2 * width :], self.qkv.bias[2 * width :])
        return v.view(*v.shape[:2], self.heads, -1).transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention from x to a context, keys and values by one fused projection."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None, shared: Parts = "") -> Tensor:
        """x (B, N, width), context (B, L, width), mask (B, 1, 1, L), shared as in `attend` -> (B, N, width)."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y: Tensor = self.out(attend(self.q_norm(q), self.k_norm(k), v, mask, shared))
        return y


class FeedForward(nn.Module):
    """out(activation(inner(x))): the transformer's two-layer perceptron."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activation, parts = ACTIVATIONS[activation]
        self.inner = nn.Linear(width, parts * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.activation(self.inner(x)))
        return y


class GEGLU(nn.Module):
    """value·gelu(gate) with (value, gate) = proj(x) (Shazeer 2020, eq. 6)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        y: Tensor = value * F.gelu(gate)
        return y


def zero(module: nn.Module) -> None:
    """Sets every parameter of a module to zero, so that the branch it ends starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
