"""Intervals of 95 %: of sets whose distance is known, so that they cover it as often as they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.measuring import bootstrap, measures
from training.measuring.distances import frechet_cost, frechet_distance, wilson
from training.measuring.measures import Pair, frechet


def gaussian(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_of_frechet_covers_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """N(0, I) and N(m, 4 I) in three dimensions: |m|^2 + 3, of so many pictures that the bias is small."""
    monkeypatch.setattr(bootstrap, "REPLICATES", 60)
    mean, hits, repetitions = torch.tensor([1.0, 0.5, 0.0]).double(), 0, 100
    for seed in range(repetitions):
        (found,) = frechet(Pair(gaussian(400, 3, 2 * seed), 2 * gaussian(300, 3, 2 * seed + 1) + mean, seed))
        assert found.interval and found.resamples == 60
        hits += found.interval[0] <= float(mean @ mean) + 3 <= found.interval[1]
    assert 0.91 <= hits / repetitions <= 0.99


def test_quantiles_would_lie_above_the_distance() -> None:
    """Why the interval is not made of them: every resample of equal distributions is farther apart than the sets."""
    a, b = gaussian(60, 20, 0), gaussian(60, 20, 1)
    pairs = zip(bootstrap.resamples(60, 50, 0), bootstrap.resamples(60, 50, 1), strict=True)
    assert min(frechet_distance(a[i], b[j]) for i, j in pairs) > frechet_distance(a, b)
    (found,) = frechet(Pair(a, b))
    assert found.interval and found.interval[0] < found.value < found.interval[1]


def test_pictures_of_one_pair_are_drawn_together() -> None:
    """A set and its shifted copy differ by the shift, whichever pictures are drawn; drawn apart they would vary."""
    rows = gaussian(50, 4, 0)
    for paired, exact in ((True, True), (False, False)):
        deviation = bootstrap.of_sets(frechet_distance, rows, rows + 1, 20, 0, paired)
        assert (deviation < 1e-9) is exact


def test_kernel_distances_draw_pairs_together_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a set and itself, whole or cut to so many pictures, CMMD is 0 in every resample; drawn apart it is not."""
    features = measures.Features("CLIP", 4, lambda pixels: pixels)
    rows = gaussian(60, 4, 0)
    for most in (60, 25):
        monkeypatch.setattr(measures, "PAIRS", most)
        for paired in (True, False):
            low, high = measures.compare(features, Pair(rows, rows, paired=paired), str)["clip_mmd_95"]
            assert (high - low < 1e-9) is paired


def test_a_mean_has_the_deviation_of_many_resamples() -> None:
    values = gaussian(40, 1, 0)[:, 0] ** 2
    means = values[bootstrap.resamples(40, 20000, 0)].mean(1)
    assert bootstrap.of_mean(values) == pytest.approx(means.std().item(), rel=0.02)


def test_resamples_are_as_many_as_can_be_afforded() -> None:
    """The more numbers a picture has, the fewer; never more than 200 nor fewer than 20."""
    counts = [bootstrap.replicates(frechet_cost(5000, 5000, dim)) for dim in (48, 512, 1024, 2048)]
    assert counts[0] == 200 and counts[-1] == 20 and counts == sorted(counts, reverse=True) and counts[1] > counts[2]


def test_a_number_bears_its_interval_and_its_published_name() -> None:
    """Frechet's distance is FID in one network alone."""
    features = measures.Features("Inception", 3, lambda pixels: pixels, published={"frechet": "fid"})
    numbers = measures.compare(features, Pair(gaussian(30, 3, 0), gaussian(40, 3, 1)), lambda name: f"{name}_x")
    assert numbers["fid_x"] == numbers["frechet_x"] and numbers["fid_x_95"] == numbers["frechet_x_95"]
    assert numbers["frechet_x_resamples"] == 200 and "clip_mmd_x" not in numbers
    low, high = numbers["precision_x_95"]
    assert (low, high) == wilson(round(40 * numbers["precision_x"]), 40)
    again = measures.compare(features, Pair(gaussian(30, 3, 0), gaussian(40, 3, 1)), lambda name: f"{name}_x")
    assert again == numbers  # keyed: no number depends on what was drawn before


def test_pairs_are_of_so_many_pictures_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen by a key, not every n-th, since captions come in turns; Frechet's distance is of all."""
    monkeypatch.setattr(measures, "PAIRS", 20)
    features = measures.Features("any", 3, lambda pixels: pixels)
    a, b = gaussian(41, 3, 0), gaussian(60, 3, 1) + 0.5
    numbers = measures.compare(features, Pair(a, b), str)
    assert numbers["frechet"] == frechet_distance(a, b)
    assert numbers["precision"] * 20 == pytest.approx(round(numbers["precision"] * 20))
    chosen = measures._some(torch.arange(60), 0)
    assert len(set(chosen.tolist())) == 20 and chosen.tolist() == sorted(chosen.tolist())
    assert set((chosen % 3).tolist()) == {0, 1, 2}
