from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor

from ldm.denoiser import Bound
from ldm.diffusion import Denoised
from ldm.exact import F64, Counted, Isotropic, Mixture, Smooth, final_variance, scalar, two_modes
from ldm.grids import Leading, Linspace, Uniform
from ldm.inverse.operators import OPERATORS, Decoded, GivenMask, LinearOperator, Operator, Spectrum
from ldm.inverse.posterior import DDRM, DPS, POSTERIORS, Posterior, Problem, RePaint, ReSample, SplitGibbs
from ldm.inverse.posterior.split_gibbs import Likelihood
from ldm.noise import Noise
from ldm.samplers import DDIM, DDPM, prior, sample
from ldm.schedules import EDM, VP, DDPMLinear, Flow, NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class Matrix(LinearOperator):
    """Any small matrix, on pictures of (1, 1, columns): y is (B, rows)."""

    kind: str = "matrix"
    rows: Tensor = field(default_factory=lambda: torch.eye(2, dtype=F64)[:1])

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.rows.to(x).T

    def domain(self, y: Tensor) -> tuple[int, int, int]:
        return 1, 1, self.rows.shape[1]

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.rows.to(y))[:, None, None]

    def pinv(self, y: Tensor) -> Tensor:
        return (y @ torch.linalg.pinv(self.rows).to(y).T)[:, None, None]

    def solve(self, residual: Tensor, scale: Tensor | float, noise: Tensor | float) -> Tensor:
        raise NotImplementedError

    def spectrum(self, shape: tuple[int, int, int], like: Tensor) -> Spectrum:
        u, s, vt = torch.linalg.svd(self.rows.to(like))
        size = len(vt)
        singular = torch.nn.functional.pad(s, (0, size - len(s)))[None, None]
        return Spectrum(singular, lambda x: x @ vt.T, lambda x: x @ vt,
                        lambda y: torch.nn.functional.pad(y @ u, (0, size - len(u)))[:, None, None])


@dataclass(frozen=True, kw_only=True)
class Squared(Operator):
    """An operator that is not linear."""

    kind: str = "squared"

    def __call__(self, x: Tensor) -> Tensor:
        return x.square().sum(1)

    def domain(self, y: Tensor) -> tuple[int, int, int]:
        return 2, y.shape[1], y.shape[2]


@dataclass(frozen=True)
class Row:
    """An oracle of vectors (B, D) as a denoiser of pictures (B, 1, 1, D)."""

    oracle: Mixture

    @property
    def schedule(self):
        return self.oracle.schedule

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        ends = self.oracle(x.flatten(1), t)
        return Denoised(ends.x0.view(x.shape), ends.eps.view(x.shape))


class Probe(Noise):
    """Noise under which an affine map of x shows its matrices: of a batch (0, e_1 ... e_D, 0, ...) each draw adds 1 to
    one coordinate of one further sample."""

    def __init__(self, dim: int, draws: int) -> None:
        super().__init__(torch.zeros(1 + dim * (1 + draws), dtype=torch.int64))
        object.__setattr__(self, "place", [1 + dim])

    def fold(self, *key: int | str) -> Probe:
        return self

    def normal(self, shape, *key, dtype=F64) -> Tensor:
        dim, place = math.prod(shape), self.place
        z = torch.zeros(len(self), dim, dtype=dtype)
        z[place[0]:place[0] + dim] = torch.eye(dim, dtype=dtype)
        place[0] += dim
        return z.view(len(self), *shape)

    def start(self, dim: int) -> Tensor:
        x = torch.zeros(len(self), dim, dtype=F64)
        x[1:1 + dim] = torch.eye(dim, dtype=F64)
        return x[:, None, None]


def affine(out: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """x -> M x + b with noise of covariance C, from what a map made of a `Probe`'s start: M, b, C."""
    out = out.flatten(1)
    offset, pushes = out[0], out[1:] - out[0]
    return pushes[:dim].T, offset, pushes[dim:].T @ pushes[dim:]


@dataclass(frozen=True)
class Normal:
    """The denoiser of rows (B, 1, 1, D) of N(0, sum of variances[i] v_i v_i^T), the v_i being orthonormal columns."""

    schedule: NoiseSchedule
    vectors: Tensor
    variances: Tensor

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = self.schedule(t)
        total = alpha**2 * self.variances + sigma**2
        parts = x @ self.vectors
        return Denoised((parts * alpha * self.variances / total) @ self.vectors.T,
                        (parts * sigma / total) @ self.vectors.T)


def pair(schedule: NoiseSchedule) -> Normal:
    """Two pixels of variance 1 and correlation 0.9."""
    vectors = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64) / 2**0.5
    return Normal(schedule, vectors, torch.tensor([1.9, 0.1], dtype=F64))


def seeds(count: int, first: int = 0) -> Noise:
    return Noise.from_seeds(range(first, first + count))


def hole(count: int, y: float = 1.0) -> Tensor:
    """y of `HALF`."""
    return torch.tensor([y, 0.0], dtype=F64).expand(count, 1, 1, 2)


HALF = GivenMask(torch.tensor([[True, False]]))  # of two pixels the first is seen
SIZE = (2, 4, 4)
CHECKER = (torch.arange(4)[:, None] + torch.arange(4)) % 2
MASK = GivenMask(CHECKER)
LIGHT = (SplitGibbs(inner_steps=3), RePaint(jump=2, resamples=2), ReSample(every=3, iterations=5))
EACH = [{light.kind: light for light in LIGHT}.get(member().kind, member()) for member in POSTERIORS]
NAMES = [member.kind for member in EACH]


def picture_y(count: int) -> Tensor:
    return MASK(seeds(count, 100).normal(SIZE, dtype=F64))


@pytest.mark.parametrize("method", [*EACH, *(member() for member in POSTERIORS)], ids=repr)
@pytest.mark.parametrize("schedule", [Flow(), VP(), EDM(), DDPMLinear()], ids=lambda schedule: schedule.kind)
def test_each_makes_the_calls_it_says_within_the_process(method: Posterior, schedule: NoiseSchedule) -> None:
    grid, shown = Uniform()(6, schedule), []
    counted = Counted(Smooth(schedule))
    x0 = method.draw(counted, MASK, picture_y(2), 0.0, grid, seeds(2), shown.append)
    assert len(counted.times) == method.calls(grid) == shown[-1].calls
    assert min(counted.times) >= schedule.t_min * (1 - 1e-9)
    assert [snapshot.step for snapshot in shown] == list(range(len(shown)))
    assert shown[-1].t == 0
    assert torch.equal(shown[-1].x, x0)
    assert x0.shape == (2, *SIZE)
    assert bool(x0.isfinite().all())


@pytest.mark.parametrize("method", EACH, ids=NAMES)
def test_a_sample_is_its_own_whatever_its_batch(method: Posterior) -> None:
    denoise, grid, y = Smooth(Flow()), Uniform()(7, Flow()), picture_y(3)
    whole = method.draw(denoise, MASK, y, 0.0, grid, seeds(3))
    assert torch.equal(method.draw(denoise, MASK, y, 0.0, grid, seeds(3)), whole)
    for i in range(3):
        alone = method.draw(denoise, MASK, y[i:i + 1], 0.0, grid, seeds(3)[i:i + 1])
        assert (alone - whole[i:i + 1]).abs().max() <= 1e-12
    other = method.draw(denoise, MASK, y, 0.0, grid, seeds(3, 7))
    assert (other - whole).abs().amax((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("method", EACH, ids=NAMES)
def test_single_precision_stays_single(method: Posterior) -> None:
    assert method.draw(Smooth(Flow()), MASK, picture_y(1).float(), 0.0, Uniform()(4, Flow()), seeds(1)).dtype == (
        torch.float32)


@pytest.mark.parametrize("method", EACH, ids=NAMES)
def test_each_refuses_in_a_sentence(method: Posterior) -> None:
    denoise, y, grid = Smooth(Flow()), picture_y(2), Uniform()(4, Flow())
    with pytest.raises(ValueError, match="2 measurements need as many seeds, got 3"):
        method.draw(denoise, MASK, y, 0.0, grid, seeds(3))
    for wrong in (grid.flip(0), grid[:-1]):
        with pytest.raises(ValueError, match=f"{method.kind} walks from noise to data: its grid must fall to 0"):
            method.draw(denoise, MASK, y, 0.0, wrong, seeds(2))
    for wrong in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma_y must be in"):
            method.draw(denoise, MASK, y, wrong, grid, seeds(2))
    if method.differentiates:
        with torch.inference_mode(), pytest.raises(ValueError, match=f"{method.kind} takes gradients"):
            method.draw(denoise, MASK, y, 0.0, grid, seeds(2))


@pytest.mark.parametrize("method", [SplitGibbs(), DDRM(), RePaint()], ids=lambda method: method.kind)
def test_an_operator_that_does_not_fit_is_refused_with_one_that_does(method: Posterior) -> None:
    with pytest.raises(ValueError, match=rf"{method.kind} (needs|fills) .*take .*resample or dps"):
        method.draw(Smooth(Flow()), Squared(), torch.ones(1, 4, 4, dtype=F64), 0.0, Uniform()(4, Flow()), seeds(1))


@pytest.mark.parametrize("method", [DPS(), ReSample()], ids=lambda method: method.kind)
def test_an_operator_may_be_any_that_is_differentiable(method: Posterior) -> None:
    y = torch.ones(1, 4, 4, dtype=F64)
    x0 = method.draw(Smooth(Flow()), Squared(), y, 0.1, Uniform()(40, Flow()), seeds(1))
    assert (Squared()(x0) - y).abs().mean() < 0.5


@pytest.mark.parametrize("method", [DPS(), ReSample()], ids=lambda method: method.kind)
def test_a_linear_decoder_is_a_factor_of_the_operator(method: Posterior) -> None:
    decoder = torch.tensor([[0.8, -0.5], [0.3, 1.1]], dtype=F64)
    behind = Decoded(HALF, lambda z: z @ decoder.T, (1, 1, 2))
    results = [method.draw(Smooth(Flow()), operator, y, 0.05, Uniform()(10, Flow()), seeds(2))
               for operator, y in ((behind, hole(2)), (Matrix(rows=decoder[:1]), hole(2)[..., 0, 0, :1]))]
    assert (results[0] - results[1]).abs().max() < 1e-12


# --- dps


def test_dps_of_zeta_zero_is_the_prior_bit_for_bit() -> None:
    denoise, grid, noise = Smooth(Flow()), Uniform()(12, Flow()), seeds(2)
    x = sample(DDPM(), denoise, prior(Flow(), SIZE, noise, F64), grid, noise)
    assert torch.equal(DPS(zeta=0.0).draw(denoise, MASK, picture_y(2), 0.0, grid, noise), x)


def test_a_step_of_dps_goes_down_the_norm_of_each_residual() -> None:
    schedule, noise, y = VP(), seeds(2), hole(2)
    grid = torch.tensor([1.0, 0.0], dtype=F64)
    x = prior(schedule, (1, 1, 2), noise, F64)
    gain = schedule(scalar(1.0)).alpha  # x0 = alpha x on N(0, 1)
    moved = DPS(zeta=0.3).draw(Isotropic(schedule, 1.0), HALF, y, 0.0, grid, noise)
    pull = 0.3 * gain * (y - gain * x).sign()
    assert (moved - (gain * x + pull * torch.tensor([1.0, 0.0]))).abs().max() < 1e-12


def test_dps_stays_put_where_y_is_met() -> None:
    still = Bound(Flow(), lambda x, t: Denoised(x * 0, x))
    x0 = DPS().draw(still, MASK, torch.zeros(1, *SIZE, dtype=F64), 0.0, Uniform()(4, Flow()), seeds(1))
    assert bool(x0.isfinite().all())


@pytest.mark.parametrize(("zeta", "floor"), [(0.1, 0.0076), (0.3, 0.026), (0.5, 0.045)])
def test_dps_ends_with_the_residual_that_zeta_sets_not_sigma_y(zeta: float, floor: float) -> None:
    """On N(0, 1) x_t is N(0, 1) at all times of this process, so that the last 200 of 1000 steps do."""
    schedule, count = DDPMLinear(), 128
    seen = CHECKER.repeat(2, 2)
    x = seeds(count, 1000).normal((1, 8, 8), dtype=F64)
    y = seen * (x + 0.05 * seeds(count, 2000).normal((1, 8, 8), dtype=F64))
    x0 = DPS(zeta=zeta).draw(Isotropic(schedule, 1.0), GivenMask(seen), y, 0.05, Linspace()(1000, schedule)[-201:],
                             seeds(count))
    assert (y - x0)[..., seen == 1].square().mean().sqrt().item() == pytest.approx(floor, rel=0.05)
    assert x0[..., seen == 0].std().item() == pytest.approx(0.995, abs=0.025)


# --- repaint


@pytest.mark.parametrize(("steps", "jump", "resamples", "entries", "down", "up"), [
    (250, 10, 10, 4571, 2410, 2160), (50, 10, 5, 371, 210, 160), (20, 5, 3, 81, 50, 30)])
def test_the_moves_of_repaint(steps: int, jump: int, resamples: int, entries: int, down: int, up: int) -> None:
    method = RePaint(jump=jump, resamples=resamples)
    visits = method.visits(steps)
    moves = [after - before for before, after in pairwise(visits)]
    assert (len(visits), moves.count(1), moves.count(-1)) == (entries, down, up)
    assert (visits[0], visits[-1], min(visits), visits.count(steps)) == (0, steps, 0, 1)
    assert method.calls(torch.linspace(1, 0, steps + 1)) == down


def test_repaint_once_is_plain_replacement() -> None:
    denoise, grid, noise, y = Smooth(Flow()), Uniform()(12, Flow()), seeds(2), picture_y(2)
    x = prior(Flow(), SIZE, noise, F64)
    for index, (t, s) in enumerate(pairwise(grid)):
        own = noise.fold("step", index)
        x, _ = DDPM().step(denoise, x, t, s, None, own)
        alpha, sigma = Flow()(s)
        x = torch.where(CHECKER.bool(), alpha * y + sigma * own.normal(SIZE, "seen", dtype=F64), x)
    assert torch.equal(RePaint(resamples=1).draw(denoise, MASK, y, 0.0, grid, noise), x)
    assert torch.equal(MASK(x), y)


def test_repaint_keeps_what_is_seen_and_refuses_noise_on_it() -> None:
    denoise, grid, y = Smooth(Flow()), Uniform()(25, Flow()), picture_y(2)
    assert torch.equal(MASK(RePaint().draw(denoise, MASK, y, 0.0, grid, seeds(2))), y)
    with pytest.raises(ValueError, match="repaint keeps y as it is, so that sigma_y is 0, got 0.1; else take split"):
        RePaint().draw(denoise, MASK, y, 0.1, grid, seeds(2))


@cache
def moved(levels: int, variance: Literal["small", "large"], before: int, after: int) -> tuple[Tensor, Tensor, Tensor]:
    """One move of RePaint on a pair of pixels of correlation 0.9, the first being 1, as an affine map."""
    noise, grid = Probe(2, 2), Linspace()(levels, DDPMLinear())
    x = RePaint(variance=variance).move(pair(DDPMLinear()), HALF.given, hole(len(noise)), noise.start(2),
                                        grid[before], grid[after], noise)
    return affine(x, 2)


def repainted(method: RePaint, levels: int) -> tuple[float, float]:
    """Mean and variance of the second pixel, without Monte-Carlo error."""
    mean, covariance = torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
    for before, after in pairwise(method.visits(levels)):
        matrix, offset, spread = moved(levels, method.variance, before, after)
        mean, covariance = matrix @ mean + offset, matrix @ covariance @ matrix.T + spread
    assert mean[0] == 1
    assert covariance[0].abs().max() == 0
    return mean[1].item(), covariance[1, 1].item()


@pytest.mark.parametrize(("jump", "resamples", "mean", "variance"), [
    (10, 1, 0.622051, 0.300258), (1, 2, 0.761701, 0.227569), (1, 5, 0.853039, 0.184748), (1, 10, 0.878610, 0.167744),
    (1, 20, 0.889610, 0.154541), (10, 10, 0.875133, 0.176455)])
def test_repaint_nears_the_posterior(jump: int, resamples: int, mean: float, variance: float) -> None:
    assert repainted(RePaint(jump=jump, resamples=resamples), 250) == pytest.approx((mean, variance), abs=6e-7)


@pytest.mark.parametrize(("levels", "mean", "variance"), [(50, 0.602336, 0.273612), (1000, 0.625614, 0.307798)])
def test_replacement_does_not_near_it_with_more_levels(levels: int, mean: float, variance: float) -> None:
    assert repainted(RePaint(resamples=1), levels) == pytest.approx((mean, variance), abs=6e-7)


def test_the_larger_variance_of_repaint() -> None:
    assert repainted(RePaint(jump=1, resamples=10, variance="large"), 250)[1] == pytest.approx(0.2002, abs=6e-5)


# --- ddrm


def restored(y: float, sigma_y: float, singular: float, steps: int = 20) -> tuple[float, float]:
    """Mean and variance of DDRM's x0 on N(0, 1), A being a number, without Monte-Carlo error."""
    grid, noise = Leading()(steps, DDPMLinear()), Probe(1, steps + 2)
    operator = Matrix(rows=torch.tensor([[singular]], dtype=F64))
    x0 = DDRM().draw(Isotropic(DDPMLinear(), 1.0), operator, torch.full((len(noise), 1), y, dtype=F64), sigma_y, grid,
                     noise).flatten()
    return x0[0].item(), (x0[1:] - x0[0]).square().sum().item()


@pytest.mark.parametrize(("y", "sigma_y", "singular", "mean", "variance"), [
    (1.0, 0.5, 1.0, 0.792410, 0.064897), (1.0, 0.05, 1.0, 0.973020, 0.021513), (1.0, 0.0, 1.0, 1.0, 0.0),
    (1.0, 0.1, 0.5, 1.835063, 0.035891), (0.0, 0.0, 0.0, 0.0, 0.634224), (0.0, 0.3, 0.0, 0.0, 0.634224)])
def test_ddrm_on_a_gaussian(y: float, sigma_y: float, singular: float, mean: float, variance: float) -> None:
    assert restored(y, sigma_y, singular) == pytest.approx((mean, variance), abs=6e-7)


def test_the_eta_of_ddrm_is_not_that_of_ddim() -> None:
    schedule = DDPMLinear()
    assert restored(0.0, 0.0, 0.0, 100)[1] == pytest.approx(0.724678, abs=6e-7)
    for eta, variance in ((0.85, 0.751457), (0.0, 0.832626)):
        grid = Leading()(20, schedule)
        start = schedule(grid[0]).sigma.item()
        assert final_variance(DDIM(eta=eta), schedule, grid, 1.0, start) == pytest.approx(variance, abs=6e-7)


@pytest.mark.parametrize("schedule", [Flow(), VP(), EDM()], ids=lambda schedule: schedule.kind)
def test_ddrm_keeps_what_a_noiseless_mask_shows(schedule) -> None:
    y = picture_y(2)
    assert torch.equal(MASK(DDRM().draw(Smooth(schedule), MASK, y, 0.0, Uniform()(7, schedule), seeds(2))), y)


# --- resample


@pytest.mark.parametrize(("sigma_r2", "mean", "variance"), [(0.25, 0.435702, 0.166667), (1e9, 0.5**0.5, 0.5),
                                                            (1e-9, 0.3, 0.0)])
def test_the_resampling_of_resample(sigma_r2: float, mean: float, variance: float) -> None:
    schedule = VP()
    t, s = schedule.time(torch.tensor(-1.0, dtype=F64)), schedule.time(torch.tensor(0.0, dtype=F64))
    above, below = schedule(t).alpha ** 2, schedule(s).alpha ** 2
    assert below.item() == pytest.approx(0.5)
    gamma = sigma_r2 / ((1 - below) / above * (1 - above / below)).item()
    fit, x, z = (torch.tensor([value], dtype=F64) for value in (1.0, 0.3, 0.0))
    method = ReSample(gamma=gamma)
    middle = method.resampled(schedule, fit, x, t, s, z)
    assert middle.item() == pytest.approx(mean, abs=6e-7)
    pushed = method.resampled(schedule, fit, x, t, s, z + 1)
    assert (pushed - middle).square().item() == pytest.approx(variance, abs=6e-7)


def test_resample_leaves_pure_noise_at_the_fit() -> None:
    fit, x, z = (torch.tensor([value], dtype=F64) for value in (1.0, 0.3, 2.0))
    noised = ReSample().resampled(Flow(), fit, x, scalar(1.0), scalar(0.4), z)
    assert noised.item() == pytest.approx(0.6 + 0.4 * 2.0)


def test_a_fit_ends_at_the_noise_and_moves_nothing_unseen() -> None:
    y = picture_y(2)
    x0 = seeds(2, 50).normal(SIZE, dtype=F64)
    fit = ReSample(iterations=400).fitted(Problem(MASK, y, 0.1), x0)
    residual = (y - MASK(fit))[..., CHECKER.bool()]
    assert residual.square().mean((1, 2)).sqrt().tolist() == pytest.approx([0.1, 0.1], abs=0.02)
    assert torch.equal(fit - MASK(fit), x0 - MASK(x0))
    assert torch.equal(ReSample().fitted(Problem(MASK, y, 0.1), fit), fit)


def test_a_fit_has_no_weight_decay() -> None:
    fitted = ReSample(iterations=400).fitted(Problem(Squared(), torch.full((1, 4, 4), 9.0, dtype=F64), 1e-3),
                                             torch.ones(1, 2, 4, 4, dtype=F64))
    assert (Squared()(fitted) - 9).abs().max() < 2e-3


# --- split-gibbs


LINEAR = [member() for member in OPERATORS if issubclass(member, LinearOperator)]


@pytest.mark.parametrize("operator", LINEAR, ids=lambda operator: operator.kind)
@pytest.mark.parametrize("sigma_y", [0.3, 1e-3])
def test_z_given_x_and_y_has_its_precision(operator: LinearOperator, sigma_y: float) -> None:
    x, z = (seeds(2, first).normal((3, 16, 16), dtype=F64) for first in (0, 10))
    y, rho = operator(seeds(2, 20).normal((3, 16, 16), dtype=F64)) + 0.1, torch.tensor(0.4, dtype=F64)
    likelihood = Likelihood.of(Problem(operator, y, sigma_y))

    def precision(x: Tensor) -> Tensor:
        return operator.adjoint(operator(x)) / sigma_y**2 + x / rho**2

    middle = likelihood.draw(x, rho, 0 * z)
    assert torch.allclose(precision(middle), operator.adjoint(y) / sigma_y**2 + x / rho**2, rtol=1e-7, atol=1e-7)

    def root(z: Tensor) -> Tensor:  # of the covariance, and symmetric
        return likelihood.draw(x, rho, z) - middle

    assert torch.allclose(precision(root(root(z))), z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("operator", LINEAR, ids=lambda operator: operator.kind)
def test_what_is_seen_without_noise_is_met(operator: LinearOperator) -> None:
    x, schedule = seeds(2, 20).normal((3, 16, 16), dtype=F64), Flow()
    y = operator(x)
    z = Likelihood.of(Problem(operator, y, 0.0)).draw(0 * x, torch.tensor(0.4, dtype=F64), x)
    assert (operator(z) - y).abs().max() < 1e-10
    x0 = DDRM().draw(Smooth(schedule), operator, y, 0.0, Uniform()(7, schedule), seeds(2))
    assert (operator(x0) - y).abs().max() < 1e-10


def iterated(method: SplitGibbs, rho: float) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration at rho on a pair of pixels of correlation 0.9, the first being 1 to 0.1, as an affine map."""
    noise = Probe(2, 1 + method.inner_steps)
    likelihood = Likelihood.of(Problem(HALF, hole(len(noise)), 0.1))
    x = method.iterate(pair(EDM()), likelihood, noise.start(2), torch.tensor(rho, dtype=F64), noise)
    return affine(x, 2)


def exactly_iterated(rho: float, absorb: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The same with x | z in closed form."""
    noise, covariance = Probe(2, 1), torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64)
    likelihood = Likelihood.of(Problem(HALF, hole(len(noise)), 0.1), absorb)
    matrix, offset, spread = affine(
        likelihood.draw(noise.start(2), torch.tensor(rho, dtype=F64), noise.normal((1, 1, 2))), 2)
    gain = covariance @ torch.linalg.inv(covariance + rho**2 * torch.eye(2, dtype=F64))
    return gain @ matrix, gain @ offset, gain @ spread @ gain.T + rho**2 * gain


def settled(matrix: Tensor, offset: Tensor, spread: Tensor) -> tuple[list[float], list[float]]:
    """Mean and variances of the law that x -> M x + b + noise of a covariance leaves as it is."""
    mean = torch.linalg.solve(torch.eye(2, dtype=F64) - matrix, offset)
    both = torch.eye(4, dtype=F64) - torch.kron(matrix, matrix)
    return mean.tolist(), torch.linalg.solve(both, spread.flatten())[[0, 3]].tolist()


TABLE = [(0.5, 59, (0.793651, 0.714286), (0.206349, 0.357143)), (0.2, 189, (0.952381, 0.857143), (0.047619, 0.228571)),
         (0.05, 2241, (0.987654, 0.888889), (0.012346, 0.2))]


@pytest.mark.parametrize(("rho", "iterations", "mean", "variances"), TABLE)
def test_split_gibbs_settles_on_the_posterior_of_a_wider_noise(rho: float, iterations: int, mean, variances) -> None:
    matrix, offset, spread = exactly_iterated(rho)
    assert settled(matrix, offset, spread)[0] == pytest.approx(mean, abs=6e-7)
    assert settled(matrix, offset, spread)[1] == pytest.approx(variances, abs=6e-7)
    before = torch.zeros(2, dtype=F64)
    moves = []
    for _ in range(iterations + 1):
        after = matrix @ before + offset
        moves.append((after - before).abs().max().item())
        before = after
    assert moves[-1] < 1e-14 <= moves[-3]


@pytest.mark.parametrize("rho", [0.1, 0.05, 0.01, 0.2])
def test_a_rho_that_is_absorbed_leaves_no_bias(rho: float) -> None:
    """As long as it is no wider than the noise; above, it takes the noise's place."""
    total = 1 + max(rho, 0.1) ** 2
    mean, variances = settled(*exactly_iterated(rho, absorb=True))
    assert mean == pytest.approx([1 / total, 0.9 / total], abs=1e-9)
    assert variances == pytest.approx([1 - 1 / total, 1 - 0.81 / total], abs=1e-9)


@pytest.mark.parametrize("operator", LINEAR, ids=lambda operator: operator.kind)
def test_what_is_absorbed_is_the_share_of_each_singular_value(operator: LinearOperator) -> None:
    """z moves away from x by rho^2 S / sigma_y^2 (y - S x), and varies by what that leaves of rho."""
    x, z = (seeds(2, first).normal((3, 16, 16), dtype=F64) for first in (0, 10))
    likelihood = Likelihood.of(Problem(operator, operator(x), 0.5), absorb=True)
    basis, rho = likelihood.basis, torch.tensor(0.4, dtype=F64)
    share = (rho * basis.singular / 0.5) ** 2
    around = likelihood.draw(0 * x, rho, 0 * z)
    close = partial(torch.testing.assert_close, rtol=1e-7, atol=1e-7)
    close(likelihood.draw(x, rho, 0 * z) - around, basis.synthesise((1 - share) * basis.analyse(x)))
    spread = rho * (1 - share).clamp(min=0).sqrt()
    close(likelihood.draw(0 * x, rho, z) - around, basis.synthesise(spread * basis.analyse(z)))


@pytest.mark.parametrize(("rho", "_", "mean", "variances"), TABLE)
@pytest.mark.parametrize(("steps", "within"), [(8, 0.07), (60, 0.015)])
def test_the_inner_walk_nears_that_law(steps: int, within: float, rho: float, _, mean, variances) -> None:
    found = settled(*iterated(SplitGibbs(inner_steps=steps), rho))
    assert found[0] == pytest.approx(mean, rel=within / 2)
    assert found[1] == pytest.approx(variances, rel=within)


def seen_to(rho: float) -> tuple[Mixture, tuple[float, float, float]]:
    """`two_modes` with the first coordinate seen as 0.1 to rho: the law, and of the second coordinate the weight of the
    first mode, the mean and the variance."""
    data = two_modes(EDM())
    total, gap = data.covariances[:, 0, 0] + rho**2, 0.1 - data.means[:, 0]
    gain = data.covariances[:, :, 0] / total[:, None]
    weights = (data.weights * (-(gap**2) / 2 / total).exp() / total.sqrt())
    weights = weights / weights.sum()
    means = data.means + gain * gap[:, None]
    covariances = data.covariances - gain[:, :, None] * data.covariances[:, :1]
    mean = (weights * means[:, 1]).sum()
    variance = (weights * (covariances[:, 1, 1] + means[:, 1] ** 2)).sum() - mean**2
    return Mixture(EDM(), weights, means, covariances), (weights[0].item(), mean.item(), variance.item())


def told(x: Tensor) -> tuple[float, float, float]:
    """The same of draws."""
    share = two_modes(EDM())._components(x.flatten(1), scalar(0.0))[1][:, 0].mean()
    return share.item(), x[..., 1].mean().item(), x[..., 1].var().item()


MODES = [(0.2, (0.550237, -0.273397, 0.215507)), (0.1, (0.781406, -0.196004, 0.152814)),
         (0.05, (0.857107, -0.173529, 0.120952))]


@pytest.mark.parametrize(("rho", "exact"), MODES)
def test_two_modes_stay_what_they_are_at_each_rho(rho: float, exact) -> None:
    law, numbers = seen_to(rho)
    assert numbers == pytest.approx(exact, abs=6e-7)
    x = law.samples(seeds(8000, 10**5))[:, None, None]
    begun, likelihood = told(x), Likelihood.of(Problem(HALF, hole(len(x), 0.1), 0.0))
    for index in range(2):
        x = SplitGibbs(inner_steps=16).iterate(Row(two_modes(EDM())), likelihood, x, torch.tensor(rho, dtype=F64),
                                               seeds(len(x)).fold(index))
    assert told(x) == pytest.approx(exact, abs=0.02)
    assert told(x) == pytest.approx(begun, abs=0.02)


def test_two_modes_are_found_from_nothing() -> None:
    method, y = SplitGibbs(rho_max=0.3, rho_min=0.2), hole(3000, 0.1)
    x = method.draw(Row(two_modes(EDM())), HALF, y, 0.0, torch.linspace(1, 0, 25), seeds(len(y)))
    assert told(x) == pytest.approx(MODES[0][1], abs=0.02)


@pytest.mark.parametrize("sigma_y", [0.05, 0.5])
@pytest.mark.parametrize(("iterations", "absorb", "least", "most"), [
    (15, True, 0.95, 1.01), (30, True, 0.95, 1.01), (30, False, 0.96, 1.2),
])  # fmt: skip
def test_a_few_iterations_are_calibrated_on_gaussian_pictures(
    iterations: int, absorb: bool, least: float, most: float, sigma_y: float
) -> None:
    """Four pixels of falling spectrum, of which two means are seen: the whole draw's law, without Monte-Carlo error."""
    corners = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, -1, 1], [1, -1, 1, -1]], dtype=F64) / 2
    variances = torch.tensor([1.0, 0.3, 0.1, 0.02], dtype=F64)
    means = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=F64) / 2
    noise = Probe(4, iterations * 9)
    y, grid = torch.zeros(len(noise), 2, dtype=F64), Uniform()(iterations, EDM())
    data = Normal(EDM(), corners, variances)
    x = SplitGibbs(absorb=absorb).draw(data, Matrix(rows=means), y, sigma_y, grid, noise).flatten(1)[5:]
    precision = corners @ torch.diag(1 / variances) @ corners.T + means.T @ means / sigma_y**2
    ratios = torch.linalg.eigvals(precision @ x.T @ x).real
    assert least < ratios.min() <= ratios.max() < most


def test_rho_falls_within_what_the_process_reaches() -> None:
    schedule = DDPMLinear()
    levels = SplitGibbs(rho_max=8.0, rho_min=0.5).levels(13, schedule)
    assert levels[[0, 9, 12]].tolist() == pytest.approx([8.0, 0.5, 0.5])
    assert (levels[:9] / levels[1:10]).tolist() == pytest.approx([16 ** (1 / 9)] * 9)
    ends = (-schedule.logsnr(torch.tensor([schedule.t_min, 1.0], dtype=F64)) / 2).exp().tolist()
    wide = SplitGibbs(rho_max=1e4, rho_min=1e-4).levels(13, schedule)
    assert (wide[-1].item(), wide[0].item()) == pytest.approx((2 * ends[0], ends[1]))
    assert SplitGibbs(rho_max=0.2, rho_min=0.2).levels(1, schedule).tolist() == [0.2]
    for rho in wide:
        times = SplitGibbs().inner(rho, schedule)
        assert bool((times.diff() < 0).all())
        assert times[0] <= 1
        assert times[-2] >= schedule.t_min * (1 - 1e-9)


# --- all operators


@pytest.mark.parametrize("operator", [member() for member in OPERATORS], ids=lambda operator: operator.kind)
@pytest.mark.parametrize("method", EACH, ids=NAMES)
def test_every_operator_is_solved_or_refused(method: Posterior, operator: Operator) -> None:
    y = operator(0.3 * seeds(2, 20).normal((3, 16, 16), dtype=F64))
    needs = {"repaint": operator.kind == "mask", "ddrm": operator.linear, "split-gibbs": operator.linear}

    def draw() -> Tensor:
        return method.draw(Smooth(Flow()), operator, y, 0.0, Uniform()(4, Flow()), seeds(2))

    if not needs.get(method.kind, True):
        with pytest.raises(ValueError, match=f"^{method.kind} (needs|fills)"):
            draw()
        return
    x0 = draw()
    assert x0.shape == (2, 3, 16, 16)
    assert bool(x0.isfinite().all())
