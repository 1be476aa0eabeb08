"""Distances between sets of pictures in a feature space, each with the number of samples it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Moments:
    """Mean and covariance of features (N, D), gathered in float64; order and batch size change nothing."""

    def __init__(self, dim: int) -> None:
        self.count, self.total, self.outer = (
            0,
            torch.zeros(dim, dtype=torch.float64),
            torch.zeros(dim, dim, dtype=torch.float64),
        )

    def add(self, features: Tensor) -> Moments:
        """Count a batch (N, D)."""
        f = features.detach().cpu().double()
        self.count, self.total, self.outer = self.count + len(f), self.total + f.sum(0), self.outer + f.T @ f
        return self

    @property
    def mean(self) -> Tensor:
        """(D,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (D, D). Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}.")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017, eq. 6), float64.

    tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2), which needs no root of a non-symmetric matrix.
    """
    root = _root(a.covariance) @ _root(b.covariance)
    cross = torch.linalg.svdvals(root).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float(distance))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD, cubic kernel (x.y / D + 1)^3 (Binkowski et al. 2018, KID), of features (N, D), (M, D)."""
    a, b = a.double(), b.double()
    n, m, dim = len(a), len(b), a.shape[1]
    if min(n, m) < 2:
        raise ValueError("a kernel distance needs at least 2 samples of each.")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / dim + 1) ** 3

    within_a = (kernel(a, a).sum() - (a.square().sum(1) / dim + 1).pow(3).sum()) / (n * (n - 1))
    within_b = (kernel(b, b).sum() - (b.square().sum(1) / dim + 1).pow(3).sum()) / (m * (m - 1))
    return float(within_a + within_b - 2 * kernel(a, b).mean())


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    p, zz = hits / count, z * z / count
    centre, half = (p + zz / 2) / (1 + zz), (z / (1 + zz)) * ((p * (1 - p) + zz / 4) / count) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return root


def share(name: str, verdicts: Sequence[bool]) -> dict[str, Any]:
    """A share and its 95 % interval."""
    hits = sum(map(bool, verdicts))
    return {name: hits / len(verdicts), f"{name}_95": list(wilson(hits, len(verdicts)))}
