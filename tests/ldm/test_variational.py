"""The variational bound against closed forms, and the hybrid loss of a learned variance."""

from __future__ import annotations

import math

import pytest
import torch
from looping import each
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion import Denoised, Diffusion
from ldm.exact import F64, Isotropic
from ldm.noise import Noise
from ldm.objectives import Denoising, Draw
from ldm.predictions import Eps, Prediction, V
from ldm.samplers import DDPM, prior, sample
from ldm.schedules import SCHEDULES, VE, VP, DDPMCosine, DDPMLinear, NoiseSchedule, Table
from ldm.times import UniformTimes
from ldm.variational import BIN, _log_bins, bound, bound_at, prior_bits
from ldm.weighting import UniformWeight

NOTHING = Cond(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
ROOT = 2**0.5


class Points(Noise):
    """Four equal points in the plane of (x0, noise) whose moments up to the third are those of two unit Gaussians: on
    them the mean of any quadratic is its exact expectation."""

    def normal(self, shape: torch.Size, *key: int | str, dtype: torch.dtype = F64) -> Tensor:  # type: ignore[override]
        return torch.tensor([[0.0], [0.0], [ROOT], [-ROOT]], dtype=dtype)


class Reverse(Isotropic):
    """The exact reverse process of N(0, s^2): its mean, and its variance as the fraction between small and large."""

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        ends, steps = super().__call__(x, t), self.schedule.steps
        (alpha, sigma), s = self.schedule(t), t - 1 / steps
        left = self.std**2 * sigma**2 / ((alpha * self.std) ** 2 + sigma**2)  # the variance of x0 given x_t
        if s < 0.5 / steps:
            small = sigma**2 * -(self.schedule.logsnr(t + 1 / steps) - self.schedule.logsnr(t)).expm1()
            fraction = (left / small).log() / (sigma**2 / small).log()
        else:
            fresh = -(self.schedule.logsnr(t) - self.schedule.logsnr(s)).expm1()
            below = self.schedule(s)
            exact = below.sigma**2 * fresh + (below.alpha * fresh) ** 2 * left
            fraction = (exact / (below.sigma**2 * fresh)).log() / (2 * (sigma / below.sigma).log())
        assert -1e-6 <= fraction <= 1 + 1e-6
        return ends._replace(log_var_frac=fraction.expand_as(x))


@pytest.mark.parametrize(
    "schedule", [DDPMLinear(steps=100), DDPMCosine(steps=100), DDPMLinear(steps=100, zero_terminal_snr=True)], ids=repr
)
@pytest.mark.parametrize("std", [0.5, 1.0])
def test_all_terms_of_the_exact_reverse_process_sum_to_the_entropy(schedule: NoiseSchedule, std: float) -> None:
    """On G(s) the bound is tight: the sum over t and the prior is H(x0) + KL(q(x_T) || N(0, 1)) in bits."""
    x0 = std * torch.tensor([[ROOT], [-ROOT], [0.0], [0.0]], dtype=F64)
    alpha, sigma = schedule(torch.ones((), dtype=F64))
    last = (alpha * std) ** 2 + sigma**2
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std**2) + (last - 1 - last.log()).item() / (2 * math.log(2))
    total = bound(Reverse(schedule, std), x0, Points(torch.zeros(4, dtype=torch.int64))).mean().item()
    assert total == pytest.approx(entropy, abs=1e-9)


def test_the_small_variance_is_a_looser_bound_by_the_closed_form() -> None:
    """Without a learned fraction each divergence is SNR(s) (1 - e^2) s^2 sigma^2 / (s^2 alpha^2 + sigma^2) / 2."""
    schedule, std = DDPMLinear(steps=100), 0.5
    alpha_bar = schedule.alpha_bar()
    left = std**2 * (1 - alpha_bar) / (std**2 * alpha_bar + 1 - alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    nats = ((snr[:-1] - snr[1:]) * left[1:] / 2).sum()
    small = (1 - alpha_bar[0]) * (1 - snr[1] / snr[0])
    nats = nats + 0.5 * ((2 * math.pi * small).log() + left[0] / small)
    nats = nats + 0.5 * (alpha_bar[-1] * std**2 - alpha_bar[-1] - (1 - alpha_bar[-1]).log())
    x0 = std * torch.tensor([[ROOT], [-ROOT], [0.0], [0.0]], dtype=F64)
    total = bound(Isotropic(schedule, std), x0, Points(torch.zeros(4, dtype=torch.int64))).mean().item()
    assert total == pytest.approx(nats.item() / math.log(2), rel=1e-9)


@pytest.mark.parametrize("std", [0.3, 0.01, 1e-3])
def test_bins_of_a_discretised_gaussian_sum_to_one(std: float) -> None:
    values = torch.linspace(-1, 1, 256, dtype=F64)
    for mean in (-0.99, 0.001, 0.7, 1.2):
        logs = _log_bins(values, torch.full_like(values, mean), torch.full_like(values, 2 * math.log(std)), BIN)
        assert bool(logs.isfinite().all()) and logs.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_bins_are_a_density_where_they_are_narrow() -> None:
    schedule, x0 = DDPMLinear(), torch.tensor([[0.1], [-0.4]], dtype=F64)
    t, ends = torch.full((2,), 0.001, dtype=F64), Denoised(x0 + 0.004, x0)
    density = bound_at(schedule, ends, x0, t)
    narrow = bound_at(schedule, ends, x0, t, bins=1e-5)
    torch.testing.assert_close(narrow + math.log2(1e-5), density, atol=1e-5, rtol=0)


def test_the_prior_term() -> None:
    x0 = torch.tensor([[0.7]], dtype=F64)
    alpha, sigma = VP()(torch.ones((), dtype=F64))
    exact = ((alpha * 0.7) ** 2 + sigma**2 - 1 - 2 * sigma.log()) / 2 / math.log(2)
    assert prior_bits(VP(), x0).item() == pytest.approx(exact.item(), abs=1e-15)
    assert prior_bits(VE(), x0).item() == pytest.approx(0.49 / 2500 / 2 / math.log(2), rel=1e-9)


def hybrid(
    schedule: NoiseSchedule = DDPMLinear(), prediction: Prediction = Eps(), *, learned: bool = True  # noqa: B008
) -> Denoising:
    diffusion = Diffusion(schedule=schedule, prediction=prediction, learned_variance=learned)
    return Denoising(diffusion=diffusion, times=UniformTimes(), weighting=UniformWeight())


@pytest.mark.parametrize("schedule", [DDPMLinear(), DDPMCosine(), VP()], ids=repr)
def test_the_bound_never_moves_the_mean(schedule: NoiseSchedule) -> None:
    """The gradient at the mean is that of the plain loss, bit for bit; the variance has one of its own."""
    noise, x0 = Noise.from_seeds(list(range(64))), Noise.from_seeds(list(range(64))).normal((2, 3, 3), "data")
    mean, v = torch.full((64, 2, 3, 3), 0.1).requires_grad_(), torch.full((64, 2, 3, 3), 0.2).requires_grad_()
    both = hybrid(schedule)(lambda x, level, cond: torch.cat([mean, v], dim=1), x0, NOTHING, noise)
    plain = hybrid(schedule, learned=False)(lambda x, level, cond: mean, x0, NOTHING, noise)
    of_mean, of_v = torch.autograd.grad(both.sum(), (mean, v))
    assert both.shape == (64,) and bool(both.isfinite().all())
    assert torch.equal(of_mean, torch.autograd.grad(plain.sum(), mean)[0])
    assert bool((of_v != 0).all()) and bool(of_v.isfinite().all())


EVERY = [cls() for cls in SCHEDULES] + [cls(zero_terminal_snr=True) for cls in SCHEDULES if issubclass(cls, Table)]


@each("schedule", EVERY)
def test_the_variance_learns_at_every_time_a_network_is_trained_at(schedule: NoiseSchedule) -> None:
    """Its gradient is finite and not 0 from t_min to pure noise, in float32, a step of the walk from either end too."""
    step = 1 / schedule.steps
    ends = [schedule.t_min, schedule.t_min + 0.5 * step, schedule.t_min + step, 1 - step, 1 - 0.5 * step, 1.0]
    t = schedule.trained(torch.tensor([*ends, 0.5], dtype=F64))
    noise = Noise.from_seeds(list(range(len(t))))
    x0, eps, v = (noise.normal((2, 3, 3), name) for name in ("data", "eps", "v"))
    v.requires_grad_()
    draw = Draw(t, eps, torch.ones_like(t))
    losses = hybrid(schedule, V()).losses(lambda x, level, cond: torch.cat([x0, v], dim=1), x0, NOTHING, draw)
    (gradient,) = torch.autograd.grad(losses.total.sum(), v)
    assert bool(losses.total.isfinite().all()) and bool(gradient.isfinite().all())
    assert bool((gradient[:-2] != 0).flatten(1).any(1).all())


def test_the_hybrid_loss_is_the_sum_with_the_published_factor() -> None:
    """T / 1000 times the bound in bits, here with a table of 100 steps; validation reads the plain error alone."""
    objective, noise = hybrid(DDPMLinear(steps=100)), Noise.from_seeds([3, 4, 5])
    x0 = noise.normal((2, 4, 4), "data")

    def network(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        return torch.cat([0.3 * x, torch.tanh(x)], dim=1)

    draw = objective.draw(x0, noise)
    x_t = objective.diffusion.perturb(x0, draw.eps, draw.t)
    ends = objective.diffusion.recover(x_t, network(x_t, draw.t, NOTHING), draw.t)
    error = (0.3 * x_t - draw.eps).square().flatten(1).mean(1)
    expected = error + 0.1 * bound_at(objective.diffusion.schedule, ends, x0, draw.t).float()
    torch.testing.assert_close(objective(network, x0, NOTHING, noise), expected)
    torch.testing.assert_close(objective.at(network, x0, NOTHING, draw.t, draw.eps), error)


def test_the_learned_variance_is_least_where_it_is_true() -> None:
    """Over constant fractions, the term of one step on G(.5) is least at the exact reverse variance."""
    schedule, t = DDPMLinear(), torch.tensor(0.3, dtype=F64)
    x0 = 0.5 * torch.tensor([[ROOT], [-ROOT], [0.0], [0.0]], dtype=F64)
    alpha, sigma = schedule(t)
    x_t = alpha * x0 + sigma * Points(torch.zeros(4, dtype=torch.int64)).normal(torch.Size([1]))
    exact = Reverse(schedule, 0.5)(x_t, t)
    fraction = exact.log_var_frac.clone().requires_grad_()  # type: ignore[union-attr]
    loss = bound_at(schedule, exact._replace(log_var_frac=fraction), x0, t.expand(4)).mean()
    (gradient,) = torch.autograd.grad(loss, fraction)
    assert abs(gradient.sum().item()) < 1e-12


def test_a_network_of_learned_variance_is_sampled_through_its_diffusion() -> None:
    from ldm.denoiser import Denoiser

    schedule, noise = DDPMLinear(), Noise.from_seeds([1, 2])
    diffusion = Diffusion(schedule=schedule, prediction=V(), learned_variance=True)
    denoiser = Denoiser(lambda x, level, cond: torch.cat([0.1 * x, torch.sin(x)], dim=1), diffusion)
    grid = torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=F64)
    x = sample(DDPM(variance="learned"), denoiser.bind(NOTHING), prior(schedule, (2, 3, 3), noise), grid, noise)
    assert x.shape == (2, 2, 3, 3) and bool(x.isfinite().all())
