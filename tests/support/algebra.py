"""What tests of linear maps compare: drawn tensors, inner products, closeness in absolute terms."""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each pair of samples, (B,)."""
    return (a * b).flatten(1).sum(1)
