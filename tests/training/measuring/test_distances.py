"""Distances between sets of features: closed forms, and what they must not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from training.measuring.distances import Moments, frechet_distance, kernel_distance, wilson


def gaussian(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean: torch.Tensor, covariance: torch.Tensor) -> Moments:
    """Moments whose mean and covariance are these, whatever the samples were."""
    made = Moments(len(mean))
    made.count = 2
    made.total = 2 * mean
    made.outer = covariance + 2 * torch.outer(mean, mean)
    return made


def test_frechet_of_two_gaussians_is_the_closed_form() -> None:
    """N(0, I) and N(m, 4 I): |m|^2 + d."""
    dim, mean = 7, torch.arange(7, dtype=torch.float64)
    eye = torch.eye(dim, dtype=torch.float64)
    found = frechet_distance(exactly(torch.zeros(dim, dtype=torch.float64), eye), exactly(mean, 4 * eye))
    assert found == pytest.approx(float(mean @ mean) + dim, rel=1e-12)


def test_frechet_agrees_with_the_matrix_square_root() -> None:
    """Against tr (A B)^(1/2) from the eigenvalues of the product, which are real and positive."""
    a, b = (Moments(5).add(gaussian(50, 5, seed) @ gaussian(5, 5, seed + 10)) for seed in (1, 2))
    cross = torch.linalg.eigvals(a.covariance @ b.covariance).sqrt().sum().real
    direct = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(direct), rel=1e-9)


def test_frechet_of_a_set_with_itself_is_zero_however_it_was_gathered() -> None:
    rows = gaussian(100, 6, 0)
    whole, parts = Moments(6).add(rows), Moments(6)
    for chunk in rows.flip(0).split(7):
        parts.add(chunk)
    assert frechet_distance(whole, parts) == pytest.approx(0, abs=1e-9)
    assert torch.allclose(parts.covariance, torch.cov(rows.T), atol=1e-12)


def test_kernel_distance_is_unbiased() -> None:
    """Its mean over equal distributions is 0 within three standard errors; a shift is seen."""
    found = [kernel_distance(gaussian(40, 4, 2 * s), gaussian(40, 4, 2 * s + 1)) for s in range(100)]
    mean = sum(found) / len(found)
    error = math.sqrt(sum((f - mean) ** 2 for f in found)) / len(found)
    assert abs(mean) < 3 * error
    assert kernel_distance(gaussian(40, 4, 0), gaussian(40, 4, 1) + 1) > max(found)


def test_kernel_distance_is_the_sum_over_pairs() -> None:
    a, b = gaussian(3, 2, 0), gaussian(4, 2, 1)

    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 2 + 1) ** 3)

    within_a = sum(k(a[i], a[j]) for i in range(3) for j in range(3) if i != j) / 6
    within_b = sum(k(b[i], b[j]) for i in range(4) for j in range(4) if i != j) / 12
    across = sum(k(x, y) for x in a for y in b) / 12
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * across, rel=1e-10)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        _ = Moments(2).add(torch.zeros(1, 2)).covariance
    with pytest.raises(ValueError, match="at least 2 samples"):
        kernel_distance(torch.zeros(1, 2), torch.zeros(3, 2))


def test_wilson_interval() -> None:
    """The textbook value for 8 of 10, and ends that stay in [0, 1]."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1 and wilson(0, 0) == (0, 1)
