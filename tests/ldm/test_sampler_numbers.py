"""The published and computed answers of each sampler, in the variable and on the grid they are stated for."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from ldm.diffusion import Denoised
from ldm.exact import F64, Counted, Impulses, Isotropic, Smooth, final_variance, fitted_order, gaussian, scalar
from ldm.grids import Karras, Uniform
from ldm.guidance import classifier_guided
from ldm.noise import Noise
from ldm.samplers import (
    DDIM,
    DDPM,
    DEIS,
    LMS,
    RK4,
    DDIMInversion,
    DPMpp2M,
    DPMpp2S,
    DPMpp3M,
    DPMpp3S,
    Euler,
    EulerMaruyama,
    Heun,
    Langevin,
    Midpoint,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    UniPC,
    prior,
    sample,
)
from ldm.schedules import EDM, VE, VP, DDPMLinear, Flow, NoiseSchedule

ONE = Noise.from_seeds([0])


def edm(sampler: Sampler, steps: int = 18) -> float:
    return sample(sampler, gaussian(EDM()), torch.full((1, 1), 80.0, dtype=F64), Karras()(steps, EDM()), ONE).item()


def log_grid(sampler: Sampler, steps: int) -> float:
    """x from sigma 10 to 0.1 on a log grid, on the EDM process."""
    grid, x = torch.logspace(1, -1, steps + 1, dtype=F64) / 80, torch.full((1, 1), 10.0, dtype=F64)
    return sample(sampler, gaussian(EDM()), x, grid, ONE).item()


def log_grid_error(sampler: Sampler, steps: int) -> float:
    return abs(log_grid(sampler, steps) - 10 * math.sqrt((0.25 + 0.01) / (0.25 + 100)))


def flow(sampler: Sampler, steps: int, t_min: float = 1e-5) -> float:
    schedule = Flow(t_min=t_min)
    return sample(sampler, gaussian(schedule), torch.ones(1, 1, dtype=F64), Uniform()(steps, schedule), ONE).item()


def test_ddpm_variances() -> None:
    schedule, grid = DDPMLinear(), Uniform()(1000, DDPMLinear())
    assert final_variance(DDPM(), schedule, grid, 1, 1) == pytest.approx(0.991067, abs=5e-7)
    assert final_variance(DDPM(variance="large"), schedule, grid, 1, 1) == pytest.approx(0.999900, abs=5e-7)
    assert final_variance(DDIM(eta=1), schedule, grid, 1, 1) == pytest.approx(0.991067, abs=5e-7)


def test_ddim_fifty_steps() -> None:
    grid = torch.cat([torch.arange(981, 0, -20, dtype=F64), torch.zeros(1, dtype=F64)]) / 1000
    for eta, expected in [(0, 0.929449), (1, 0.857434)]:
        assert final_variance(DDIM(eta=eta), DDPMLinear(), grid, 1, 1) == pytest.approx(expected, abs=5e-7)


def test_posterior_variance_of_the_second_step() -> None:
    """beta~[1] of the linear table, seen as the variance of one ancestral step from a denoiser that answers 0."""

    class Zero(Smooth):
        def __call__(self, x: Tensor, t: Tensor) -> Denoised:
            return Denoised(torch.zeros_like(x), torch.zeros_like(x))

    grid = torch.tensor([0.002, 0.001], dtype=F64)
    x = sample(DDPM(), Zero(DDPMLinear()), torch.zeros(2, 1, dtype=F64), grid, Impulses(2))
    assert x.square().sum().item() == pytest.approx(5.45319e-5, abs=5e-11)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Euler(variable="sigma"), 0.42303144),
        (Heun(variable="sigma"), 0.52762464),
        (RK4(variable="sigma"), 0.50047113),
        (DPMpp2M(), 0.53114007),
    ],
    ids=repr,
)
def test_eighteen_edm_steps(sampler: Sampler, expected: float) -> None:
    assert edm(sampler) == pytest.approx(expected, abs=5e-9)


def test_many_edm_steps_are_exact() -> None:
    exact = 80 * math.sqrt(0.25 / (0.25 + 6400))
    assert exact == pytest.approx(0.49999023, abs=5e-9)
    assert edm(RK4(variable="sigma"), 256) == pytest.approx(exact, abs=1e-5)


def test_flow_steps() -> None:
    for steps, expected in [(1, 0.0), (10, 0.4307826), (50, 0.4853967)]:
        assert flow(Euler(), steps) == pytest.approx(expected, abs=5e-8)
    assert flow(Midpoint(), 10) == pytest.approx(0.4998847, abs=5e-8)
    # The classic rule calls the network at t = 0, which a velocity allows when it is declared.
    assert flow(RK4(), 4, t_min=0.0) == pytest.approx(0.5000061, abs=5e-8)
    assert flow(RK4(), 64) == pytest.approx(0.5, abs=1e-6)


def test_error_slopes_on_the_edm_problem() -> None:
    """sigma 10 to 0.1 on a log grid, integrated in sigma: 0.99, 2.01, 4.00; 2M 1.94-1.99, UniPC-2 2.94-2.99."""

    def slope(sampler: Sampler) -> float:
        counts = [64, 128, 256]
        return fitted_order(counts, [log_grid_error(sampler, steps) for steps in counts])

    # 0.9954 on these counts: it was printed short.
    assert slope(Euler(variable="sigma")) == pytest.approx(0.99, abs=6e-3)
    assert slope(Heun(variable="sigma")) == pytest.approx(2.01, abs=5e-3)
    assert slope(RK4(variable="sigma")) == pytest.approx(4.00, abs=5e-3)
    assert slope(UniPC(solver_order=1, corrector=False)) == pytest.approx(1, abs=5e-3)
    assert slope(UniPC(solver_order=1)) == pytest.approx(2, abs=5e-3)
    assert 1.94 < slope(DPMpp2M()) < 1.99 and 2.94 < slope(UniPC()) < 2.99
    assert slope(DPMpp3S()) == pytest.approx(3, abs=0.1) and slope(DPMpp2S()) == pytest.approx(2, abs=0.05)
    assert log_grid_error(UniPC(solver_order=3), 64) < 1e-7


def test_unipc_calls_once_a_step_and_once_more() -> None:
    for order in (1, 2, 3):
        counted = Counted(gaussian(EDM()))
        grid = torch.logspace(1, -1, 19, dtype=F64) / 80
        sample(UniPC(solver_order=order), counted, torch.full((1, 1), 10.0, dtype=F64), grid, ONE)
        assert len(counted.times) == 18 + 1


def test_ddim_inversion() -> None:
    grid = torch.cat([torch.zeros(1, dtype=F64), torch.arange(1, 982, 20, dtype=F64)]) / 1000
    oracle, x = gaussian(DDPMLinear(), 1.0), torch.ones(1, 1, dtype=F64)
    noised = sample(DDIMInversion(), oracle, x, grid, ONE)
    assert sample(DDIM(), oracle, noised, grid.flip(0), ONE).item() == pytest.approx(0.9983563, abs=5e-8)


def euler_maruyama_of_score_sde(schedule: NoiseSchedule, steps: int, eps: float) -> float:
    """The variance on G(1) with that code's own bookkeeping: times from linspace(1, eps), every step of length 1 /
    steps, the last not a landing but a hair longer, its noise left out."""
    batch = steps + 2
    x, noise = torch.zeros(batch, 1, dtype=F64), Impulses(batch)
    x[0] = schedule.prior_std
    for t in torch.linspace(1, eps, steps, dtype=F64):
        x, _ = EulerMaruyama().step(Isotropic(schedule, 1.0), x, t, t - 1 / steps - 1e-15, None, noise)
    x[steps] = 0
    return x.square().sum().item()


def test_reverse_sde() -> None:
    assert euler_maruyama_of_score_sde(VP(), 1000, 1e-3) == pytest.approx(1.001280, abs=5e-7)
    assert euler_maruyama_of_score_sde(VP(), 100, 1e-3) == pytest.approx(1.013009, abs=5e-7)
    assert euler_maruyama_of_score_sde(VE(), 1000, 1e-5) == pytest.approx(1.001102, abs=5e-7)


def test_ve_steps() -> None:
    grid = torch.cat([torch.linspace(1, 1e-5, 1000, dtype=F64), torch.zeros(1, dtype=F64)])
    for sampler, expected in [(ReverseDiffusion(), 1.008467), (DDPM(variance="large"), 1.008467), (DDPM(), 0.991424)]:
        assert final_variance(sampler, VE(), grid, 1, 50) == pytest.approx(expected, abs=5e-7)


def test_annealed_langevin_has_its_known_bias() -> None:
    """232 levels from 50 to 0.01, 5 steps each, from U[0, 1]: 14 % too much variance, by the scheme's own doing."""
    schedule, batch = VE(), 232 * 5 + 2
    sigmas = schedule(torch.linspace(1, 0, 232, dtype=F64).clamp(min=1e-12)).sigma
    torch.testing.assert_close(sigmas[:-1] / sigmas[1:], torch.full((231,), 1.037559, dtype=F64), rtol=5e-7, atol=0)
    grid = torch.cat([torch.linspace(1, 0, 232, dtype=F64).clamp(min=1e-12), torch.zeros(1, dtype=F64)])
    x = torch.zeros(batch, 1, dtype=F64)
    x[0] = (1 / 12) ** 0.5
    drawn = sample(Langevin(step_size=6.2e-6 / 0.01**2), Isotropic(schedule, 1.0), x, grid, Impulses(batch))
    assert drawn.square().sum().item() == pytest.approx(1.138567, abs=5e-7)


class Across(Noise):
    """Noise of the norm that many dimensions give it, exactly across a sample that lies along the first of two axes."""

    def normal(self, shape: torch.Size, *key: int | str, dtype: torch.dtype = F64) -> Tensor:  # type: ignore[override]
        return torch.tensor([[0.0, 2**0.5]], dtype=dtype)


def test_one_corrector_step() -> None:
    """On a stationary N(0, sigma^2) variance grows by 1.002621 a step, towards a fixed point of 1 + snr^2 = 1.0256."""
    schedule, t = VE(), scalar(0.6)
    oracle, noise = Isotropic(schedule, 1.0), Across(torch.zeros(1, dtype=torch.int64))
    variance, ratio = 1 + schedule(t).sigma ** 2, torch.ones((), dtype=F64)
    growth = []
    for _ in range(400):
        x = torch.stack([(2 * variance * ratio).sqrt(), torch.zeros((), dtype=F64)])[None]
        moved = PredictorCorrector().correct(oracle, x, t, t, noise).square().mean() / variance
        growth.append((moved / ratio).item())
        ratio = moved
    assert growth[0] == pytest.approx(1.002621, abs=5e-7)
    assert ratio.item() == pytest.approx(1 + 0.16**2, abs=1e-9)


def test_the_corrector_with_a_frozen_step() -> None:
    """Langevin steps of size 2 snr^2 sigma^2 on N(0, sigma^2): the fixed point is 1 / (1 - snr^2) = 1.026273."""
    schedule, t, count = VE(), scalar(0.6), 300
    x = torch.zeros(count + 2, 1, dtype=F64)
    x[0] = schedule(t).sigma
    walk = Langevin(inner_steps=count, step_size=2 * 0.16**2)
    # Data of one point: the marginal is N(0, sigma^2) itself. On VE, going on to the next level leaves x as it is.
    drawn, _ = walk.step(Isotropic(schedule, 0.0), x, t, scalar(0.5), None, Impulses(count + 2))
    ratio = drawn.square().sum() / schedule(t).sigma ** 2
    assert ratio.item() == pytest.approx(1.026273, abs=5e-7)


def test_classifier_guidance() -> None:
    """p(y | x) ~ e^(2x) on G(.5): the mean 0.496875 that sigma_max 80 leaves of 0.5, and 0.99375 at scale 2."""
    shares = gaussian(EDM())

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        return 2 * x[:, 0] * (0.25 / (0.25 + EDM()(t).sigma ** 2))

    for scale, mean in [(1.0, 0.496875), (2.0, 0.99375)]:
        guided = classifier_guided(shares, log_prob, scale)
        x = torch.zeros(1, 1, dtype=F64)
        drawn = sample(RK4(variable="sigma"), guided, x, Karras()(256, EDM()), ONE).item()
        assert drawn == pytest.approx(mean, abs=5e-7)


def test_unip_of_order_one_is_ddim_to_the_last_digits() -> None:
    """2e-16 on the log grid from 10 to 0.1: a step is the same within an ulp or two, and the run within their sum."""
    for steps in (16, 64, 256):
        apart = log_grid(UniPC(solver_order=1, corrector=False), steps) - log_grid(DDIM(), steps)
        assert abs(apart) <= 1e-15, (steps, apart)
    for sigma in (10.0, 3.0, 0.5, 0.11):
        t, s, x = scalar(sigma / 80), scalar(0.9 * sigma / 80), torch.full((1, 1), sigma / 10, dtype=F64)
        rules = UniPC(solver_order=1, corrector=False), DDIM()
        left, right = (rule.step(gaussian(EDM()), x, t, s, None, ONE)[0].item() for rule in rules)
        assert left == pytest.approx(right, rel=4.5e-16, abs=0)


def test_no_corrector_is_the_predictor_bit_for_bit() -> None:
    noise, schedule = Noise.from_seeds([1, 2]), VP()
    x, grid = prior(schedule, (3,), noise), Uniform()(8, schedule)
    expected = sample(ReverseDiffusion(), Smooth(schedule), x, grid, noise)
    for idle in (PredictorCorrector(snr=0.0), PredictorCorrector(corrector_steps=0)):
        assert torch.equal(sample(idle, Smooth(schedule), x, grid, noise), expected)


MULTISTEP = [DPMpp2M(), DPMpp3M(), UniPC(solver_order=3, corrector=False), DEIS(), LMS(solver_order=3), LMS()]


@pytest.mark.parametrize(("sampler", "power"), list(zip(MULTISTEP, [3, 4, 4, 4, 4, 5], strict=True)), ids=repr)
def test_one_multistep_step_errs_by_its_own_power(sampler: Sampler, power: int) -> None:
    """With a history on the exact path, the last of some equal steps errs by h^(order + 1): no trace of the start."""
    schedule, errors, widths = EDM(), [], [0.08, 0.04, 0.02]
    for width in widths:
        sigmas = torch.exp(width * torch.arange(5, -1, -1, dtype=F64)) * 0.3
        path = torch.sqrt(0.25 + sigmas**2)[:, None, None]
        memory = None
        for index in range(5):
            times = sigmas[index] / 80, sigmas[index + 1] / 80
            x, memory = sampler.step(gaussian(schedule), path[index], *times, memory, ONE)
        errors.append((x - path[-1]).abs().item())
    assert fitted_order([1, 2, 4], errors) == pytest.approx(power, abs=0.4)


@pytest.mark.parametrize(("fraction", "variance"), [(0.0, "small"), (1.0, "large")])
def test_learned_variance_lies_between_the_two(fraction: float, variance: Literal["small", "large"]) -> None:
    """At v = -1 and 1, that is a fraction of 0 and 1, the learned variance is beta~ and beta themselves."""

    @dataclasses.dataclass
    class Learned(Smooth):
        def __call__(self, x: Tensor, t: Tensor) -> Denoised:
            return super().__call__(x, t)._replace(log_var_frac=torch.full_like(x, fraction))

    noise, grid = Noise.from_seeds([1, 2]), Uniform()(10, VP())
    x = prior(VP(), (3,), noise, dtype=F64)
    got = sample(DDPM(variance="learned"), Learned(VP()), x, grid, noise)
    torch.testing.assert_close(
        got, sample(DDPM(variance=variance), Smooth(VP()), x, grid, noise), rtol=1e-12, atol=1e-12
    )
