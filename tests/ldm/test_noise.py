from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.noise import Noise

SEEDS = [0, 1, 2, -1, 2**63, 12345]


def test_a_sample_depends_on_its_seed_and_key_alone() -> None:
    whole = Noise.from_seeds(SEEDS).normal((3, 5), "eps", 7)
    for index, seed in enumerate(SEEDS):
        assert torch.equal(whole[index : index + 1], Noise.from_seeds([seed]).normal((3, 5), "eps", 7))
    assert torch.equal(whole[2:4], Noise.from_seeds(SEEDS)[2:4].normal((3, 5), "eps", 7))
    assert torch.equal(whole.flip(0), Noise.from_seeds(SEEDS[::-1]).normal((3, 5), "eps", 7))


def test_folding_is_a_key() -> None:
    noise = Noise.from_seeds(SEEDS)
    draws = [
        noise.normal((4,)),
        noise.normal((4,), 0),
        noise.normal((4,), "0"),
        noise.normal((4,), 0, 0),
        noise.fold(0).normal((4,), 1),
        noise.fold(1).normal((4,), 0),
        noise.normal((4,), -1),
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=4, unique=True), st.integers(-(2**40), 2**40))
def test_different_seeds_give_different_numbers(seeds: list[int], key: int) -> None:
    drawn = Noise.from_seeds(seeds).uniform((8,), key)
    assert bool(((drawn > 0) & (drawn < 1)).all())
    assert len(drawn.flatten().unique()) == 8 * len(seeds)


def test_moments_and_independence() -> None:
    z = Noise.from_seeds(list(range(256))).normal((1024,), "eps", dtype=torch.float64)
    n = z.numel()
    for power, expected, spread in [(1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)]:
        assert abs((z**power).mean().item() - expected) < 4.5 * spread / n**0.5
    # Neighbouring seeds, neighbouring elements and neighbouring keys are uncorrelated.
    other = Noise.from_seeds(list(range(256))).normal((1024,), "other", dtype=torch.float64)
    for a, b in [(z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z, other)]:
        assert abs((a * b).mean().item()) < 4.5 / a.numel() ** 0.5


def test_uniform_fills_its_bins() -> None:
    u = Noise.from_seeds(list(range(64))).uniform((1024,))
    counts = torch.histc(u.float(), 64, 0, 1).double()
    chi = ((counts - 1024) ** 2 / 1024).sum().item()
    assert 25 < chi < 125


def test_values_are_frozen() -> None:
    """Published pictures depend on these numbers: they may not change."""
    assert Noise.from_seeds([0]).uniform((1,)).item() == pytest.approx(0.33805245419550556, abs=1e-15)
    assert Noise.from_seeds([42]).normal((1,), "eps", 3).item() == pytest.approx(-1.6817272901535034, abs=1e-6)


def test_shapes_and_dtypes() -> None:
    noise = Noise.from_seeds([1, 2])
    assert noise.normal((3, 1, 5)).shape == (2, 3, 1, 5) and noise.normal(()).shape == (2,)
    assert noise.normal((2,)).dtype == torch.float32 and noise.uniform(()).dtype == torch.float64
    with pytest.raises(ValueError, match="int64"):
        Noise(torch.zeros(3))
