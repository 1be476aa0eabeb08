"""The Frechet distance between sets of pictures in a feature space; shares of pictures and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017, eq. 6) of features (N, D), (M, D), in float64.

    A and B are the unbiased covariances. With A = R'R and B = S'S, tr (A B)^(1/2) is the sum of the singular values of
    R S', which needs no root of a matrix and holds of singular ones: R and S are the centred pictures themselves, or
    where there are many the triangles of their QR. ValueError for fewer than two of either.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("a covariance needs at least 2 samples.")
    many = _many(len(a), len(b), a.shape[1])
    (mean_a, root_a), (mean_b, root_b) = _gaussian(a, many), _gaussian(b, many)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(0.0, float(distance))


def frechet_cost(n: int, m: int, dim: int) -> float:
    """Multiplications of `frechet_distance`, roughly: QR of either set, and singular values."""
    many = _many(n, m, dim)
    low, high = sorted(min(size, dim) if many else size for size in (n, m))
    triangles = sum(2.0 * size * dim**2 for size in (n, m) if many and size > dim)
    return triangles + low * high * dim + 8.0 * low**2 * high


def _many(n: int, m: int, dim: int) -> bool:
    """Whether a triangle is quicker than singular values of a matrix of all pictures: about from D / 2 of both on."""
    return min(n, m) > dim // 2


def _gaussian(rows: Tensor, many: bool) -> tuple[Tensor, Tensor]:
    """The mean (D,), and R (N or D, D) with R'R the unbiased covariance."""
    rows = rows.double()
    mean = rows.mean(0)
    root = (rows - mean) / (len(rows) - 1) ** 0.5
    return mean, torch.linalg.qr(root, mode="r").R if many and len(rows) > rows.shape[1] else root


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    p, zz = hits / count, z * z / count
    centre, half = (p + zz / 2) / (1 + zz), (z / (1 + zz)) * ((p * (1 - p) + zz / 4) / count) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def share(name: str, verdicts: Sequence[bool]) -> dict[str, Any]:
    """A share and its 95 % interval."""
    hits = sum(map(bool, verdicts))
    return {name: hits / len(verdicts), f"{name}_95": list(wilson(hits, len(verdicts)))}
