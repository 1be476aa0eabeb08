"""KID's and CMMD's distances: by hand, unbiased or not as published, however the pictures are cut into blocks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from mmd import clip_mmd, kernel_distance
from torch import Tensor

from training.measuring import bootstrap, kernels, measures
from training.measuring.kernels import Cubic, Gaussian, biased, sums, unbiased
from training.measuring.measures import SUBSETS, Pair, _subsets
from training.measuring.measures import kernel_distance as measured


def gaussian(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ones(*sets: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.ones(1, len(rows), dtype=torch.float64) for rows in sets)


def cubic(x: Tensor, y: Tensor) -> float:
    return float((x @ y / len(x) + 1) ** 3)


def rbf(x: Tensor, y: Tensor) -> float:
    return math.exp(-float((x - y).square().sum()) / 200)


def test_two_pictures_by_hand() -> None:
    """D = 1, x = {0, 1}, y = {2, 3}: pairs 1; 7^3; across (1 + 1 + 27 + 64) / 4."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    assert kernel_distance(x, y) == pytest.approx(1 + 343 - 2 * 93 / 4, rel=1e-14)


@pytest.mark.parametrize("kernel", [cubic, rbf])
def test_weights_say_how_often_a_picture_counts(kernel: Callable[[Tensor, Tensor], float]) -> None:
    """A picture that is drawn three times is three in the V-statistic, and no pair of itself in the U-statistic."""
    a, b = gaussian(4, 3, 0), gaussian(5, 3, 1)
    left, right = torch.tensor([[3.0, 0, 1, 2]]).double(), torch.tensor([[1.0, 1, 0, 0, 4]]).double()
    own = Cubic() if kernel is cubic else Gaussian()
    found = sums(own, a, b, left, right)
    u, v = unbiased(found, left, right).item(), biased(found, left, right).item()

    def within(rows: Tensor, weights: list[float], every: bool) -> float:
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if every or i != j]
        total = sum(weights[i] * weights[j] for i, j in pairs)
        return sum(weights[i] * weights[j] * kernel(rows[i], rows[j]) for i, j in pairs) / total

    p, q = left[0].tolist(), right[0].tolist()
    across = sum(p[i] * q[j] * kernel(a[i], b[j]) for i in range(4) for j in range(5)) / (sum(p) * sum(q))
    for value, every in ((u, False), (v, True)):
        assert value == pytest.approx(within(a, p, every) + within(b, q, every) - 2 * across, rel=1e-10)


def test_cmmd_is_a_thousand_times_the_biased_statistic() -> None:
    """Of unit vectors sigma is 10; a set is at 0 from itself."""
    a, b = (torch.nn.functional.normalize(gaussian(n, 6, n), dim=1) for n in (7, 9))
    means = [sum(rbf(x, y) for x in left for y in right) / (len(left) * len(right))
             for left, right in ((a, a), (b, b), (a, b))]  # fmt: skip
    assert clip_mmd(a, b) == pytest.approx(1000 * (means[0] + means[1] - 2 * means[2]), rel=1e-9)
    assert clip_mmd(a, a.flip(0)) == pytest.approx(0, abs=1e-9)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = gaussian(50, 4, 0), gaussian(31, 4, 1)
    whole = [kernel_distance(a, b), clip_mmd(a, b)]
    monkeypatch.setattr(kernels, "ROWS", 7)
    assert [kernel_distance(a, b), clip_mmd(a, b)] == pytest.approx(whole, rel=1e-10)


def test_many_pictures_are_compared_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel matrix has more rows than a block."""
    seen: list[tuple[int, ...]] = []
    call = Cubic.__call__

    def noting(self: Cubic, x: Tensor, y: Tensor) -> Tensor:
        seen.append((len(x), len(y)))
        return call(self, x, y)

    monkeypatch.setattr(Cubic, "__call__", noting)
    kernel_distance(gaussian(2000, 2, 0), gaussian(1500, 2, 1))
    assert max(rows for rows, _ in seen) == kernels.ROWS and len(seen) == 4 + 3 + 4


def third_moments(mean: float, std: float) -> list[float]:
    return [mean, mean**2 + std**2, mean**3 + 3 * mean * std**2]


def squared_mmd(p: list[float], q: list[float]) -> float:
    """Of the cubic kernel in one dimension: E k(x, y) = sum_n binom(3, n) E x^n E y^n."""
    def mean(x: list[float], y: list[float]) -> float:
        return 1 + 3 * x[0] * y[0] + 3 * x[1] * y[1] + x[2] * y[2]

    return mean(p, p) + mean(q, q) - 2 * mean(p, q)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_interval_of_kid_covers_the_truth(shift: float) -> None:
    """Gaussians in one dimension, whose distance is known: 95 % of intervals, and more where they are equal."""
    truth, hits, repetitions = squared_mmd(third_moments(0, 0.4), third_moments(shift, 0.4)), 0, 300
    for seed in range(repetitions):
        pair = Pair(0.4 * gaussian(120, 1, 2 * seed), 0.4 * gaussian(100, 1, 2 * seed + 1) + shift, seed)
        (found,) = measured(pair)
        assert found.interval and found.name == "kernel_distance"
        hits += found.interval[0] <= truth <= found.interval[1]
    assert (0.92 if shift else 0.95) <= hits / repetitions <= (0.98 if shift else 1)


def test_subsets_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 of 1000 different pictures each; their mean is near the distance over all pairs."""
    weights = _subsets(1200, 3)
    assert weights.shape == (SUBSETS, 1200) == (100, 1200) and set(weights.flatten().tolist()) == {0.0, 1.0}
    assert (weights.sum(1) == 1000).all() and len({tuple(row.tolist()) for row in weights}) == SUBSETS
    monkeypatch.setattr(measures, "SUBSET", 100)
    a, b = gaussian(120, 2, 0), gaussian(100, 2, 1) + 0.3
    distance, deviation = measured(Pair(a, b))
    assert deviation.name == "kernel_distance_subset_std" and deviation.interval is None
    values = [kernel_distance(a[row.bool()], b) for row in _subsets(120, 0)]
    assert deviation.value == pytest.approx(torch.tensor(values).std(correction=0).item(), rel=1e-6)
    assert sum(values) / SUBSETS == pytest.approx(distance.value, abs=4 * deviation.value / SUBSETS**0.5)


def test_resamples_are_keyed_and_as_large_as_the_set() -> None:
    first = bootstrap.resamples(50, 20, 7)
    assert torch.equal(first, bootstrap.resamples(50, 20, 7)) and not torch.equal(first, bootstrap.resamples(50, 20, 8))
    counts = bootstrap.multiplicities(first)
    assert (counts.sum(1) == 50).all() and counts[3, 9] == (first[3] == 9).sum()
