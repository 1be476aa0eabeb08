"""The exact denoisers against calculus: what judges the samplers is itself proven, for any mixture in any dimension."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looping import each
from torch import Tensor

from ldm.diffusion import Diffusion
from ldm.exact import (
    F64,
    Beside,
    Impulses,
    Isotropic,
    Mixture,
    Through,
    draws_of,
    end_of_ode,
    final_variance,
    gaussian,
    marginal,
    scalar,
    two_modes,
)
from ldm.grids import Karras, Uniform
from ldm.noise import Noise
from ldm.predictions import PREDICTIONS
from ldm.samplers import DDPM, RK4, SAMPLERS, Heun, PredictorCorrector, prior, sample
from ldm.schedules import SCHEDULES, VE, DDPMCosine, Flow, NoiseSchedule

ALL: list[NoiseSchedule] = [*(cls() for cls in SCHEDULES), DDPMCosine(zero_terminal_snr=True)]


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    """One to three Gaussians in one to four dimensions, of any covariance and weight, under any schedule."""
    dim, count, seed = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 2**31))
    noise = Noise.from_seeds(list(range(seed, seed + count)))
    roots = 0.5 * noise.normal((dim, dim), "root", dtype=F64)
    weights = 0.1 + noise.uniform((), "weight")
    return Mixture(draw(st.sampled_from(ALL)), weights / weights.sum(), noise.normal((dim,), "mean", dtype=F64),
                   roots @ roots.mT + 0.05 * torch.eye(dim, dtype=F64))


def points(oracle: Mixture, t: Tensor, count: int = 5) -> tuple[Tensor, Noise]:
    """x_t of some samples, a little off them."""
    alpha, sigma = oracle.schedule(t)
    noise = Noise.from_seeds(list(range(count)))
    x0 = oracle.samples(noise)
    return alpha * x0 + 1.3 * sigma * noise.normal(x0.shape[1:], "eps", dtype=F64), noise


def inside(schedule: NoiseSchedule, u: float) -> Tensor:
    return scalar(schedule.t_min + (1 - schedule.t_min) * u)


@settings(max_examples=40)
@given(oracle=mixtures(), u=st.floats(0.05, 0.95))
def test_score_and_denoiser_are_the_gradient_of_the_log_density(oracle: Mixture, u: float) -> None:
    t = inside(oracle.schedule, u)
    x, (alpha, sigma) = points(oracle, t)[0].requires_grad_(), oracle.schedule(t)
    (gradient,) = torch.autograd.grad(oracle.log_density(x, t).sum(), x)
    with torch.no_grad():
        ends, score = oracle(x, t), oracle.score(x, t)
    torch.testing.assert_close(score, gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(-ends.eps / sigma, gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alpha * ends.x0 + sigma * ends.eps, x.detach(), rtol=1e-10, atol=1e-10)


@settings(max_examples=25)
@given(oracle=mixtures(), u=st.floats(0.1, 0.9))
def test_the_velocity_carries_the_density(oracle: Mixture, u: float) -> None:
    """The continuity equation, d log p / dt + div v + v . grad log p = 0, by automatic derivatives."""
    t = inside(oracle.schedule, u).requires_grad_()
    x = points(oracle, t.detach(), 3)[0].requires_grad_()
    for index in range(3):
        row = x[index : index + 1]
        logp = oracle.log_density(row, t).sum()
        by_t, by_x = torch.autograd.grad(logp, (t, row))
        jacobian = torch.autograd.functional.jacobian(lambda y: oracle.velocity(y, t.detach())[0], row)[:, 0]
        flux = jacobian.trace() + (oracle.velocity(row, t.detach()) * by_x).sum()
        torch.testing.assert_close(by_t, -flux.detach(), rtol=1e-7, atol=1e-7)


@settings(max_examples=8)
@given(oracle=mixtures())
def test_samples_have_the_mixtures_moments(oracle: Mixture) -> None:
    """Mean and covariance within 5 standard errors of 8192 samples, and each sample from its own seed."""
    count = 8192
    drawn = oracle.samples(Noise.from_seeds(list(range(count))))
    mean = oracle.weights @ oracle.means
    spread = oracle.means - mean
    covariance = torch.einsum("k,kij->ij", oracle.weights, oracle.covariances + spread[:, :, None] * spread[:, None])
    for values, exact in ((drawn, mean), (torch.einsum("ni,nj->nij", drawn - mean, drawn - mean), covariance)):
        assert bool(((values.mean(0) - exact).abs() <= 5 * values.std(0) / count**0.5).all())
    assert torch.equal(oracle.samples(Noise.from_seeds([5, 3])), drawn[[5, 3]])


def test_the_density_at_time_zero_is_the_datas_own() -> None:
    """Written out for one correlated Gaussian in the plane, on whose peak it is 1 / (2 pi sqrt(det C))."""
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=F64)
    oracle = Mixture(Flow(), torch.ones(1, dtype=F64), torch.tensor([[1.0, -2.0]], dtype=F64), covariance[None])
    peak = oracle.log_density(torch.tensor([[1.0, -2.0]], dtype=F64), scalar(0.0)).exp().item()
    assert peak == pytest.approx(1 / (2 * torch.pi * (0.5 * 0.4 - 0.09) ** 0.5), rel=1e-12)


@each("schedule", ALL)
def test_the_isotropic_oracle_is_the_gaussian_without_matrices(schedule: NoiseSchedule) -> None:
    x, t = torch.tensor([[0.3, -1.1], [2.0, 0.0]], dtype=F64), inside(schedule, 0.4)
    for got, expected in zip(Isotropic(schedule, 0.7, 0.2)(x, t)[:2], gaussian(schedule, 0.7, 0.2, 2)(x, t)[:2],
                             strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", [Flow(), VE(), DDPMCosine()], ids=repr)
def test_the_end_of_the_ode_is_the_closed_form_and_has_no_steps_left(schedule: NoiseSchedule) -> None:
    t, noise = inside(schedule, 1.0), Noise.from_seeds([0, 1, 2, 3])
    alpha, _ = schedule(t)
    x = prior(schedule, (2,), noise, dtype=F64)
    exact = 0.3 + 0.5 * (x - alpha * 0.3) / marginal(schedule, t, 0.5) ** 0.5
    got = end_of_ode(lambda process: gaussian(process, 0.5, 0.3, 2), schedule, x, t)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-7)
    coarse, fine = (end_of_ode(two_modes, schedule, x, t, steps) for steps in (200, 400))
    torch.testing.assert_close(coarse, fine, rtol=0, atol=3e-7)
    walked = sample(RK4(), two_modes(schedule), x, Karras()(100, schedule), noise)
    # A sampler lands from t_min, below which a network may not be called.
    torch.testing.assert_close(walked, fine, rtol=0, atol=5e-3)


def test_impulses_give_the_variance_that_numbers_have() -> None:
    grid, noise = Uniform()(8, Flow()), Noise.from_seeds(list(range(64)))
    drawn = sample(DDPM(), Isotropic(Flow()), noise.normal((1024,), "start", dtype=F64), grid, noise)
    assert drawn.var().item() == pytest.approx(final_variance(DDPM(), Flow(), grid, 0.5, 1.0), rel=0.03)


def test_a_batch_beside_each_other_is_each_through_its_own_prediction() -> None:
    diffusions = [Diffusion(schedule=Flow(), prediction=cls()) for cls in PREDICTIONS if not cls().refusal(Flow())]
    oracle, x, t = two_modes(Flow()), torch.randn(1 + len(diffusions), 2, dtype=F64), scalar(0.3)
    together = Beside(oracle, diffusions)(x, t).x0
    for part, whole, denoise in zip(x.split(1), together.split(1), alone(oracle, diffusions), strict=True):
        torch.testing.assert_close(denoise(part, t).x0, whole)


def alone(oracle: Mixture, diffusions: list[Diffusion]) -> Iterator[Mixture | Through]:
    yield oracle
    yield from (Through(oracle, diffusion) for diffusion in diffusions)


def test_draws_are_counted_where_a_sampler_is_affine() -> None:
    grid, oracle = Uniform()(6, Flow()), Isotropic(Flow(), 0.5, 0.3)
    assert draws_of(Heun(), oracle, grid) == 0 and draws_of(DDPM(), oracle, grid) == 5
    assert draws_of(PredictorCorrector(), oracle, grid) is None
    for sampler in (cls() for cls in SAMPLERS if cls().order):
        count = draws_of(sampler, oracle, grid)
        assert count is not None and (count == 0) == sampler.rises
        sample(sampler, oracle, torch.zeros(count + 1, 1, dtype=F64), grid, Impulses(count + 1))
