"""Precision, recall, density and coverage: by hand, by brute force, of a set and itself, of equal distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.measuring import precision_recall
from training.measuring.measures import Pair
from training.measuring.measures import precision_recall as measured
from training.measuring.precision_recall import neighbours


def gaussian(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def line(*places: float) -> Tensor:
    return torch.tensor(places).double()[:, None]


def test_on_a_line_by_hand() -> None:
    """k = 1. Real 0, 1, 3, 10 reach 1, 1, 2, 7; others 1.5, 5, 40 reach 3.5, 3.5, 35."""
    found = neighbours(line(0, 1, 3, 10), line(1.5, 5, 40), 1, 1)
    assert found.precise.tolist() == [True, True, False]  # 5 lies on the edge of the ball of 3
    assert found.recalled.tolist() == [True, True, True, True]
    assert found.density.tolist() == [2, 1, 0]  # open balls: 1.5 in those of 1 and 3, 5 in that of 10 alone
    assert found.covered.tolist() == [False, True, True, True]


def test_a_set_and_itself() -> None:
    """Precision and recall 1; density 1 by open balls, of the picture itself and its k - 1 nearest; coverage 1."""
    rows = gaussian(60, 5, 0)
    for other in (rows, rows.flip(0)):
        found = neighbours(rows, other, 3, 5)
        assert found.precise.all() and found.recalled.all() and found.covered.all()
        assert found.density.double().mean().item() == pytest.approx(1, rel=1e-12)


def test_against_every_distance_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of four pictures, whatever is turned or shifted."""
    monkeypatch.setattr(precision_recall, "ROWS", 4)
    real, other, k, deep = gaussian(23, 3, 1).double(), gaussian(17, 3, 2).double() * 0.7 + 0.4, 3, 5

    def radius(rows: Tensor, i: int, k: int) -> float:
        return sorted(math.dist(rows[i].tolist(), rows[j].tolist()) for j in range(len(rows)) if j != i)[k - 1]

    apart = [[math.dist(x.tolist(), y.tolist()) for y in other] for x in real]
    radii, wide = ([radius(real, i, n) for i in range(len(real))] for n in (k, deep))
    reach = [radius(other, j, k) for j in range(len(other))]
    columns = range(len(other))
    wanted = (
        [any(apart[i][j] <= radii[i] for i in range(len(real))) for j in columns],
        [any(apart[i][j] <= reach[j] for j in columns) for i in range(len(real))],
        [sum(apart[i][j] < wide[i] for i in range(len(real))) / deep for j in columns],
        [min(apart[i]) < wide[i] for i in range(len(real))],
    )
    turn = torch.linalg.qr(gaussian(3, 3, 3).double()).Q
    for a, b in ((real, other), (5 * real @ turn + 2, 5 * other @ turn + 2)):
        assert [part.tolist() for part in neighbours(a, b, k, deep)] == [pytest.approx(part) for part in wanted]


def test_what_is_missing_and_what_is_strange_are_told_apart() -> None:
    """Two clusters: a set of the first alone is precise and recalls half; one of both and a third recalls all."""
    first, second, third = (gaussian(50, 2, seed) + 100 * seed for seed in (0, 1, 2))
    real = torch.cat([first, second])
    half = neighbours(real, gaussian(50, 2, 5), 3, 5)
    assert half.precise.float().mean() > 0.9 and half.recalled[50:].sum() == half.covered[50:].sum() == 0
    more = neighbours(real, torch.cat([gaussian(50, 2, 5), gaussian(50, 2, 6) + 100, third]), 3, 5)
    assert more.precise[100:].sum() == 0 and more.recalled.float().mean() > 0.9


def test_equal_distributions_have_the_expected_density_and_coverage() -> None:
    """E density = 1; E coverage = 1 - prod_{j<k} (N - 1 - j) / (N + M - 1 - j) (Naeem et al. 2020, lemma 2)."""
    n, m, k = 40, 30, 5
    found = [neighbours(gaussian(n, 2, 2 * s), gaussian(m, 2, 2 * s + 1), 3, k) for s in range(300)]
    coverage = torch.stack([one.covered.double().mean() for one in found])
    density = torch.stack([one.density.mean() for one in found])
    wanted = 1 - math.prod((n - 1 - j) / (n + m - 1 - j) for j in range(k))
    assert abs(coverage.mean() - wanted) < 4 * coverage.std() / 300**0.5
    assert abs(density.mean() - 1) < 4 * density.std() / 300**0.5


def test_equal_pictures_are_at_no_distance() -> None:
    """As by subtraction, not by the quicker formula, which puts large equal pictures apart."""
    rows = 1e4 + gaussian(300, 960, 0)
    assert precision_recall.distances(rows[:40], rows).diagonal().max() == 0


def test_too_few_pictures_have_no_neighbours() -> None:
    with pytest.raises(ValueError, match="5 nearest neighbours need more than 5 pictures"):
        neighbours(gaussian(20, 2, 0), gaussian(5, 2, 1), 3, 5)


def test_shares_have_wilsons_interval_and_density_that_of_its_pictures() -> None:
    real, other = gaussian(80, 3, 0), gaussian(60, 3, 1)
    found = {one.name: one for one in measured(Pair(real, other))}
    by_hand = neighbours(real, other, 3, 5)
    assert found["precision"].value == by_hand.precise.double().mean() and found["recall"].value <= 1
    error = (by_hand.density.var(correction=0) / 60).sqrt().item()
    low, high = found["density"].interval or (0, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=1e-4)
    assert found["coverage"].interval and found["coverage"].interval[1] <= 1
