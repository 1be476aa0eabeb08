"""Distances between sets of features: closed forms, and what they must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from mmd import kernel_distance
from torch import Tensor

from training.measuring.distances import frechet_distance, wilson


def gaussian(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean: Tensor, root: Tensor) -> Tensor:
    """Samples (2 D, D) whose mean is `mean` and whose unbiased covariance is root root'."""
    dim = len(mean)
    signs = torch.cat([torch.eye(dim, dtype=torch.float64), -torch.eye(dim, dtype=torch.float64)])
    return mean + signs @ root.T * ((2 * dim - 1) / 2) ** 0.5


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.mean(0), torch.cov(rows.T)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_frechet_of_two_gaussians_is_the_closed_form(scale: float) -> None:
    """N(0, I) and N(m, s^2 I): |m|^2 + d (s - 1)^2; and of the same covariance, |m|^2 alone."""
    dim, mean = 7, torch.arange(7, dtype=torch.float64)
    eye = torch.eye(dim, dtype=torch.float64)
    found = frechet_distance(exactly(0 * mean, eye), exactly(mean, scale * eye))
    assert found == pytest.approx(float(mean @ mean) + dim * (scale - 1) ** 2, rel=1e-12)


@pytest.mark.parametrize(("n", "m", "dim"), [(50, 60, 5), (50, 4, 5), (4, 3, 9), (9, 30, 8)])
def test_frechet_agrees_with_the_matrix_square_root(n: int, m: int, dim: int) -> None:
    """Against tr (A B)^(1/2) from the eigenvalues of the product, also where A or B is singular; whichever set is
    first; and in turned, shifted coordinates."""
    a, b = gaussian(n, dim, 1) @ gaussian(dim, dim, 11), gaussian(m, dim, 2) @ gaussian(dim, dim, 12)
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    direct = float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(direct, rel=1e-5)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-10)
    turn = torch.linalg.qr(gaussian(dim, dim, 3)).Q
    assert frechet_distance(a @ turn + 5, b @ turn + 5) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * frechet_distance(a, b), rel=1e-9)


def test_frechet_of_a_set_with_itself_is_zero_in_whatever_order() -> None:
    for rows in (gaussian(100, 6, 0), gaussian(5, 20, 0), 1e3 + 1e-3 * gaussian(100, 6, 0)):
        assert frechet_distance(rows, rows.flip(0)) == pytest.approx(0, abs=1e-12 * float(rows.square().sum()))


def test_kernel_distance_is_unbiased() -> None:
    """Its mean over equal distributions is 0 within three standard errors; a shift is seen."""
    found = [kernel_distance(gaussian(40, 4, 2 * s), gaussian(40, 4, 2 * s + 1)) for s in range(100)]
    mean = sum(found) / len(found)
    error = math.sqrt(sum((f - mean) ** 2 for f in found)) / len(found)
    assert abs(mean) < 3 * error
    assert kernel_distance(gaussian(40, 4, 0), gaussian(40, 4, 1) + 1) > max(found)


def test_kernel_distance_is_the_sum_over_pairs() -> None:
    a, b = gaussian(3, 2, 0), gaussian(4, 2, 1)

    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 2 + 1) ** 3)

    within_a = sum(k(a[i], a[j]) for i in range(3) for j in range(3) if i != j) / 6
    within_b = sum(k(b[i], b[j]) for i in range(4) for j in range(4) if i != j) / 12
    across = sum(k(x, y) for x in a for y in b) / 12
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * across, rel=1e-10)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(torch.zeros(1, 2), torch.zeros(3, 2))


def test_wilson_interval() -> None:
    """The textbook value for 8 of 10, and ends that stay in [0, 1]."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1 and wilson(0, 0) == (0, 1)
