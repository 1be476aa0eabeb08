"""Power-function averages and their reconstruction, against direct averages and published numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from training.errors import UserError
from training.loop.power_ema import (
    FOLDER,
    PowerAverages,
    Profile,
    decay,
    drop_after,
    exponent,
    mixture,
    reconstruct,
    snapshots,
)

STEPS = 8192


@pytest.mark.parametrize(
    ("length", "gamma"), [(0.05, 16.9722), (0.10, 6.93720), (0.15, 3.55787), (0.20, 1.82621), (0.25, 0.719824)]
)
def test_published_exponents(length: float, gamma: float) -> None:
    found = exponent(length)
    assert found == pytest.approx(gamma, rel=1e-5)
    assert ((found + 1) / ((found + 2) ** 2 * (found + 3))) ** 0.5 == pytest.approx(length, rel=1e-12)


def test_the_average_of_a_rising_line() -> None:
    """Weights w_t = t average to (gamma + 1) / (gamma + 2) t."""
    gamma, average = exponent(0.1), 0.0
    for t in range(1, 20001):
        average += (1 - decay(gamma, t)) * (t - average)
    assert average / 20000 == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-4)


def averages(path: np.ndarray, lengths: list[float], at: list[int]) -> dict[tuple[float, int], np.ndarray]:
    """Direct averages of a path (steps, D), as of the steps asked for."""
    found = {}
    for length in lengths:
        gamma, e = exponent(length), np.zeros(path.shape[1])
        for t in range(1, len(path) + 1):
            e = e + (1 - decay(gamma, t)) * (path[t - 1] - e)
            if t in at:
                found[length, t] = e
    return found


@pytest.mark.parametrize(
    ("count", "errors"),
    [(32, [2e-4, 1e-5, 3e-5, 4e-4]), (8, [9e-3, 9e-4, 3e-3, 1e-2])],
    ids=["32", "8"],
)
def test_rebuilt_averages_of_a_random_walk(count: int, errors: list[float]) -> None:
    path = np.random.default_rng(0).normal(size=(STEPS, 64)).cumsum(0)
    at = [STEPS * (i + 1) // count for i in range(count)]
    kept = averages(path, [0.05, 0.10], at)
    profiles = [Profile(t, exponent(length)) for length, t in kept]
    direct = averages(path, [0.03, 0.07, 0.15, 0.20], [STEPS])
    for length, expected in zip([0.03, 0.07, 0.15, 0.20], errors, strict=True):
        weights = mixture(profiles, Profile(STEPS, exponent(length)))
        rebuilt = sum(w * e for w, e in zip(weights, kept.values(), strict=True))
        exact = direct[length, STEPS]
        assert np.linalg.norm(rebuilt - exact) / np.linalg.norm(exact) < 2 * expected
    for (length, t), exact in kept.items():
        weights = mixture(profiles, Profile(t, exponent(length)))
        rebuilt = sum(w * e for w, e in zip(weights, kept.values(), strict=True))
        assert np.linalg.norm(rebuilt - exact) < 1e-12 * np.linalg.norm(exact)


def test_snapshots_on_disk(tmp_path: Path) -> None:
    """Averages of a moving layer: kept, loaded, and rebuilt at another length as a direct average has it."""
    layer = nn.Linear(3, 2)
    powers, direct = PowerAverages({"net": layer}, [0.05, 0.1]), PowerAverages({"net": layer}, [0.07])
    for step in range(1, 401):
        with torch.no_grad():
            layer.weight += torch.sin(torch.arange(6.0).view(2, 3) + step / 50) / 10
        powers.update(step)
        direct.update(step)
        if step % 25 == 0:
            powers.keep(tmp_path, step)
    rebuilt, step = reconstruct(tmp_path / FOLDER, 0.07)
    assert step == 400 and set(rebuilt) == {"net.weight", "net.bias"}
    torch.testing.assert_close(rebuilt["net.weight"], direct.shadows["0.070"]["net.weight"], rtol=2e-2, atol=2e-2)
    same, step = reconstruct(tmp_path / FOLDER, 0.1, 400)
    torch.testing.assert_close(same["net.weight"], powers.shadows["0.100"]["net.weight"], rtol=1e-4, atol=1e-4)
    other = PowerAverages({"net": nn.Linear(3, 2)}, [0.05, 0.1])
    other.load(powers.tensors())
    for name, value in other.tensors().items():
        assert torch.equal(value, powers.tensors()[name])


def test_a_future_that_was_given_up(tmp_path: Path) -> None:
    """Its snapshots are removed where the run goes on, and where they were left are not used beyond the run's end."""
    layer = nn.Linear(1, 1, bias=False)
    powers = PowerAverages({"net": layer}, [0.1])
    for step in (100, 200, 300):
        with torch.no_grad():
            for shadow in powers.shadows["0.100"].values():
                shadow.fill_(100.0 if step > 200 else 1.0)
        powers.keep(tmp_path, step)
    rebuilt, at = reconstruct(tmp_path / FOLDER, 0.1, end=200)
    assert at == 200 and rebuilt["net.weight"].item() == pytest.approx(1.0)
    assert drop_after(tmp_path, 200) == ["step-00000300.safetensors"] and drop_after(tmp_path, 200) == []
    assert list(snapshots(tmp_path / FOLDER)) == [100, 200] and drop_after(tmp_path / "none", 0) == []


def test_refusals(tmp_path: Path) -> None:
    for length in (0.0, 0.3):
        with pytest.raises(ValueError, match="length"):
            exponent(length)
    with pytest.raises(UserError, match="no snapshots"):
        reconstruct(tmp_path, 0.1)
