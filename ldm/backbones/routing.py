"""Token routing: some tokens of each picture pass by the inner blocks while a transformer is trained, and cost nothing
there (TREAD: Krause et al. 2025, arXiv 2501.04765). Which ones, the caller says by scores."""

from __future__ import annotations

import torch
from torch import Tensor

ROUTE = "route"  # the extra (B, N) of scores, uniform in [0, 1)


def kept(scores: Tensor, share: float, prefix: int) -> Tensor:
    """The tokens (B, K) that go through all blocks, in their order: all but `share` of the picture's N, those of the
    least scores (B, N); and the `prefix` tokens before these."""
    count = max(1, round(scores.shape[1] * (1 - share)))
    chosen = scores.argsort(dim=1)[:, :count].sort(dim=1).values + prefix
    return torch.cat([torch.arange(prefix, device=scores.device).expand(len(scores), -1), chosen], dim=1)


def at(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """The entries of x at `index` along `dim`, the same for all sides where index has 1."""
    shape = [*x.shape]
    shape[dim] = index.shape[dim]
    return x.gather(dim, index.expand(shape))


def put_back(tokens: Tensor, kept: Tensor, passing: Tensor) -> Tensor:
    """All tokens (B, N, D) as they passed by, `tokens` (B, K, D) in the places `kept`."""
    return passing.scatter(1, kept[..., None].expand_as(tokens), tokens)
