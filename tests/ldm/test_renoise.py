"""Churn, restart and the adaptive pairs against closed forms on the exact Gaussian."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.exact import F64, Counted, Impulses, Isotropic, Smooth, fitted_order, gaussian, scalar, two_modes
from ldm.grids import Karras, Uniform
from ldm.noise import Noise
from ldm.samplers import (
    RK4,
    BogackiShampine,
    DormandPrince,
    Euler,
    EulerMaruyama,
    Heun,
    HeunChurn,
    Restart,
    Sampler,
    Snapshot,
    prior,
    sample,
)
from ldm.samplers.adaptive import Embedded
from ldm.samplers.renoise import renoised
from ldm.schedules import EDM, VP, Flow

STD, ONE = 0.5, Noise.from_seeds([0])
PAIRS = [DormandPrince(), BogackiShampine()]


def variance(sampler: Sampler, grid: Tensor, start: float) -> float:
    """The exact variance at the end, by one impulse a draw."""
    batch = 200
    x = torch.zeros(batch, 1, dtype=F64)
    x[0] = start
    return sample(sampler, Isotropic(EDM(), STD), x, grid, Impulses(batch)).square().sum().item()


def heun(low: float, high: float) -> float:
    """What one Heun step in sigma from `high` to `low` multiplies x by on N(0, STD^2); an Euler step where low is 0."""
    rate = high / (STD**2 + high**2)
    moved = 1 + (low - high) * rate
    return moved if low == 0 else 1 + (low - high) / 2 * (rate + low / (STD**2 + low**2) * moved)


@pytest.mark.parametrize(("churn", "noise"), [(40 / 256, 1.003), (0.4, 1.0), (0.0, 1.0)])
def test_churn_is_edms_algorithm(churn: float, noise: float) -> None:
    """The variance after 18 steps, by EDM's algorithm 2 in three lines of numbers."""
    expected, grid = 80.0**2, Karras()(18, EDM())
    for high, low in pairwise((grid * 80).tolist()):
        gamma = churn if 0.05 <= high <= 50 else 0.0
        above = high * (1 + gamma)
        expected = (expected + noise**2 * (above**2 - high**2)) * heun(low, above) ** 2
    assert variance(HeunChurn(churn=churn, noise_scale=noise), grid, 80.0) == pytest.approx(expected, rel=1e-12)


def test_no_churn_and_no_repeats_are_heun_bit_for_bit() -> None:
    noise, x = Noise.from_seeds([1, 2]), 80 * Noise.from_seeds([1, 2]).normal((3,), dtype=F64)
    expected = sample(Heun(variable="sigma"), Smooth(EDM()), x, Karras()(9, EDM()), noise)
    for idle in (HeunChurn(churn=0), HeunChurn(ratio_min=60, ratio_max=70), Restart(repeats=0), Restart(intervals=())):
        assert torch.equal(sample(idle, Smooth(EDM()), x, Karras()(9, EDM()), noise), expected)


def test_restart_is_its_own_recursion() -> None:
    sampler, grid = Restart(intervals=((0.06, 0.3),), repeats=3, inner_steps=4), Karras()(18, EDM())
    expected, sigmas = 80.0**2, (grid * 80).tolist()
    for high, low in pairwise(sigmas):
        expected *= heun(low, high) ** 2
        if low <= 0.06 < high:
            inner = [(0.3 ** (1 / 7) + i / 4 * (low ** (1 / 7) - 0.3 ** (1 / 7))) ** 7 for i in range(5)]
            for _ in range(3):
                expected += 0.3**2 - low**2
                for a, b in pairwise(inner):
                    expected *= heun(b, a) ** 2
    assert variance(sampler, grid, 80.0) == pytest.approx(expected, rel=1e-12)


def test_a_restart_shrinks_an_error_as_the_theory_says() -> None:
    """A start with twice the variance, to sigma 0.1 and restarted to 1 with fine steps: the error that is left falls by
    (s^2 + 0.01) / (s^2 + 1) a repeat."""
    grid, exact = torch.linspace(math.log(10), math.log(0.1), 60, dtype=F64).exp() / 80, STD**2 + 0.01
    start = (2 * (STD**2 + 100)) ** 0.5

    def error(repeats: int) -> float:
        sampler = Restart(intervals=((0.1001, 1.0),), repeats=repeats, inner_steps=60)
        return variance(sampler, grid, start) - exact

    assert error(1) / error(0) == pytest.approx(exact / (STD**2 + 1), rel=5e-3)
    assert error(2) / error(1) == pytest.approx(exact / (STD**2 + 1), rel=5e-2)


def test_noise_put_in_reaches_the_marginal() -> None:
    """From pure data, from inside and up to pure noise."""
    for schedule in (Flow(), VP(), EDM()):
        for low, high in ((0.0, 0.4), (0.2, 0.7), (0.3, 1.0)):
            x = torch.zeros(2, 1, dtype=F64)
            alpha, sigma = schedule(scalar(low))
            x[0] = ((alpha * STD) ** 2 + sigma**2).sqrt()
            moved = renoised(schedule, x, scalar(low), scalar(high), torch.tensor([[0.0], [1.0]], dtype=F64))
            above = schedule(scalar(high))
            expected = (above.alpha * STD) ** 2 + above.sigma**2
            assert moved.square().sum().item() == pytest.approx(expected.item(), rel=1e-12)


# Adaptive pairs


@pytest.mark.parametrize("sampler", PAIRS, ids=repr)
def test_order_conditions(sampler: Embedded) -> None:
    """Nodes are row sums, the last stage is the result, and both rules of the pair integrate polynomials."""
    rule = sampler.pair
    for node, row in zip(rule.nodes, rule.rows, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-14)
    degree = 4 if isinstance(sampler, DormandPrince) else 2
    for power in range(degree + 1):
        assert sum(b * c**power for b, c in zip(rule.rows[-1], rule.nodes[:-1], strict=True)) == pytest.approx(
            1 / (power + 1)
        )
    for power in range(degree):
        difference = sum(e * c**power for e, c in zip(rule.difference, rule.nodes, strict=True))
        assert difference == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize(("sampler", "order"), [(PAIRS[0], 5), (PAIRS[1], 3)], ids=["dopri5", "bosh3"])
def test_without_halving_it_has_the_order_of_its_rule(sampler: Embedded, order: int) -> None:
    plain, counts, errors = type(sampler)(halvings=0), [8, 16, 32], []  # type: ignore[call-arg]
    for steps in counts:
        grid = torch.linspace(0.95, 0.1, steps + 1, dtype=F64)
        x = sample(plain, gaussian(Flow()), torch.ones(1, 1, dtype=F64), grid, ONE).item()
        errors.append(abs(x - math.sqrt((0.25 * 0.81 + 0.01) / (0.25 * 0.05**2 + 0.95**2))))
    assert fitted_order(counts, errors) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("kind", [DormandPrince, BogackiShampine])
def test_the_error_follows_the_tolerance_and_the_calls_are_reported(kind: type[Embedded]) -> None:
    """EDM's problem from 80 to 0 in one step of the grid: exactly 0.49999023, but for the landing from sigma_min."""
    exact, errors, calls, shots = 80 * math.sqrt(0.25 / (0.25 + 6400)), [], [], list[Snapshot]()
    for tolerance in (1e-2, 1e-4, 1e-6):
        sampler, counted = kind(tolerance=tolerance, halvings=20), Counted(gaussian(EDM()))  # type: ignore[call-arg]
        x = torch.full((1, 1), 80.0, dtype=F64)
        drawn = sample(sampler, counted, x, torch.tensor([1.0, 0.0]), ONE, shots.append)
        errors.append(abs(drawn.item() - exact))
        calls.append(len(counted.times))
        assert shots[-1].calls == calls[-1]
    assert errors[1] < 1e-3 and errors[2] < 2e-5 and calls[0] < calls[1] < calls[2] < 6000
    assert calls[1] < (250 if kind is DormandPrince else 400)


@pytest.mark.parametrize("sampler", PAIRS, ids=repr)
def test_error_control_is_per_sample_bit_for_bit(sampler: Sampler) -> None:
    """Samples in need of different steps: alone and together they are the same, and the times called are shared."""
    x, noise = torch.tensor([[0.1, 0.2], [3.0, -2.0], [0.9, 0.41]], dtype=F64), Noise.from_seeds([0, 1, 2])
    grid, oracle = Uniform()(2, Flow()), two_modes(Flow())
    counts = []
    together = Counted(oracle)
    whole = sample(sampler, together, x, grid, noise)
    for index in range(3):
        alone = Counted(oracle)
        part = sample(sampler, alone, x[index : index + 1], grid, noise[index : index + 1])
        torch.testing.assert_close(part, whole[index : index + 1], rtol=1e-13, atol=1e-13)
        counts.append(len(alone.times))
    assert len(set(counts)) > 1 and max(counts) <= len(together.times) <= sum(counts)


def test_adaptive_agrees_with_a_fine_fixed_grid_on_a_mixture() -> None:
    noise = Noise.from_seeds(list(range(8)))
    x = prior(Flow(), (2,), noise, dtype=F64)
    fine = sample(RK4(), two_modes(Flow()), x, Uniform()(400, Flow()), noise)
    close = sample(DormandPrince(tolerance=1e-7), two_modes(Flow()), x, Uniform()(4, Flow()), noise)
    torch.testing.assert_close(close, fine, rtol=0, atol=2e-5)


# Stochastic flow sampling


def test_stochastic_flow_sampling() -> None:
    """With no strength it is Euler on the velocity; with any, the variance converges to the data's with order 1."""
    x, noise = torch.tensor([[0.3], [-1.0]], dtype=F64), Noise.from_seeds([0, 1])
    still = sample(EulerMaruyama(diffusion="sigma", strength=0), two_modes_1d(), x, Uniform()(9, Flow()), noise)
    torch.testing.assert_close(still, sample(Euler(), two_modes_1d(), x, Uniform()(9, Flow()), noise))
    for strength in (0.5, 1.0, 2.0):
        errors, counts = [], [32, 64, 128]
        for steps in counts:
            start = torch.zeros(steps + 2, 1, dtype=F64)
            start[0] = 1
            sampler = EulerMaruyama(diffusion="sigma", strength=strength)
            drawn = sample(sampler, Isotropic(Flow(), STD), start, Uniform()(steps, Flow()), Impulses(steps + 2))
            errors.append(abs(drawn.square().sum().item() - STD**2))
        assert errors[-1] < 0.02 and fitted_order(counts, errors) > 0.75


def two_modes_1d() -> Isotropic:
    return Isotropic(Flow(), STD, 0.3)


@pytest.mark.parametrize(
    "build",
    [
        lambda: HeunChurn(churn=0.5),
        lambda: HeunChurn(churn=-0.1),
        lambda: HeunChurn(ratio_min=2, ratio_max=1),
        lambda: HeunChurn(variable="lambda"),  # type: ignore[arg-type]
        lambda: Restart(intervals=((0.3, 0.06),)),
        lambda: Restart(inner_steps=0),
        lambda: Restart(variable="lambda"),  # type: ignore[arg-type]
        lambda: DormandPrince(tolerance=0),
        lambda: BogackiShampine(halvings=-1),
    ],
)
def test_nonsense_is_refused(build: object) -> None:
    with pytest.raises(ValueError):
        build()  # type: ignore[operator]
