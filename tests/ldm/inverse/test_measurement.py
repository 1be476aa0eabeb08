"""Measurements against Gaussians and mixtures, whose posteriors are known."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from algebra import normal
from linear import Matrix
from torch import Tensor

from ldm.denoiser import Bound, Denoise
from ldm.diffusion import Denoised
from ldm.exact import F64, Impulses, Isotropic, Mixture, final_variance, gaussian, scalar, two_modes
from ldm.grids import Exponential, Linspace
from ldm.inverse.linearised import conjugate_gradients, linearised
from ldm.inverse.measurement import (
    DDNM,
    MEASUREMENTS,
    PSLD,
    TMPD,
    Descent,
    DiffPIR,
    DPSBayes,
    Measurement,
    PiGDM,
    by_jacobian,
)
from ldm.inverse.operators import Decoded, Phase
from ldm.noise import Noise
from ldm.samplers import DDPM, DPMppSDE2M, Heun, Sampler, sample
from ldm.schedules import EDM, VE, VP, DDPMLinear, Flow, NoiseSchedule

SEEN = Matrix(matrix=torch.ones(1, 1, dtype=F64))
FIRST = Matrix(matrix=torch.tensor([[1.0, 0.0]], dtype=F64))
ONE = torch.ones(1, 1, dtype=F64)
ODE = Heun(variable="sigma")
RULES = tuple(cls() for cls in MEASUREMENTS)


def draws(seed: int, *shape: int) -> Tensor:
    return normal(*shape, seed=seed)


def latent(left: Tensor, right: Tensor, bend: float = 1.0) -> Decoded:
    """Of z (B, 1, 1, D): y = A D(z) with A = `left` and the decoder tanh(bend W z) / bend, W = `right`; W z at 0."""

    def decode(z: Tensor) -> Tensor:
        picture = z @ right.T
        return torch.tanh(bend * picture) / bend if bend else picture

    return Decoded(operator=Matrix(matrix=left), decode=decode, shape=(1, 1, right.shape[1]),
                   encode=lambda picture: picture @ right)


def shaped(data: Mixture) -> Denoise:
    """An oracle of vectors for x of any shape."""
    return Bound(data.schedule, lambda x, t: Denoised(*(end.view_as(x) for end in data(x.flatten(1), t)[:2])))


def correlated(schedule: NoiseSchedule) -> Mixture:
    """N(0, C) in the plane with unit variances and correlation .9."""
    covariance = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]], dtype=F64)
    return Mixture(schedule, torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), covariance)


@cache
def ends_of(rule: Measurement, std: float, sigma_y: float, sampler: Sampler = ODE) -> tuple[float, float]:
    """Mean and variance of what is drawn of data N(0, std^2) given y = 1, exactly: the walk is an affine map of its
    start and its noise."""
    schedule = EDM(sigma_max=200)
    grid = Exponential(sigma_min=1e-3, sigma_max=200)(400, schedule)
    batch = 2 if sampler is ODE else len(grid) + 2
    x = torch.zeros(batch, 1, dtype=F64)
    x[-1] = schedule.prior_std
    noise = Noise.from_seeds([0, 0]) if sampler is ODE else Impulses(batch)
    drawn = sample(sampler, rule(Isotropic(schedule, std), SEEN, ONE, sigma_y), x, grid, noise)
    return drawn[0].item(), (drawn - drawn[0]).square().sum().item()


@pytest.mark.parametrize(
    ("rule", "std", "x0"),
    [(PiGDM(), 1, 0.8103448), (DDNM(), 1, 0.8103448), (TMPD(), 1, 0.8103448), (DiffPIR(prior_weight=1), 1, 0.8103448),
     (DPSBayes(), 1, 1.0976331), (TMPD(), 0.5, 0.5731707), (PiGDM(), 0.5, 0.5008276), (DDNM(), 0.5, 0.6862069)],
)
def test_one_call_at_one_point(rule: Measurement, std: float, x0: float) -> None:
    ends = rule(gaussian(Flow(), std), SEEN, ONE, 0.5)(torch.full((1, 1), 0.5, dtype=F64), scalar(0.4))
    assert ends.x0.item() == pytest.approx(x0, abs=5e-8)
    assert ends.eps.item() == pytest.approx((0.5 - 0.6 * x0) / 0.4, abs=1e-6)


def test_the_unit_call_is_the_mean_weighted_by_precision() -> None:
    alpha, sigma, sigma_y, x = 0.6, 0.4, 0.5, 0.5
    mean = (alpha * x / sigma**2 + 1 / sigma_y**2) / (1 + alpha**2 / sigma**2 + 1 / sigma_y**2)
    found = PiGDM()(gaussian(Flow(), 1.0), SEEN, ONE, sigma_y)(torch.full((1, 1), x, dtype=F64), scalar(0.4))
    assert found.x0.item() == pytest.approx(mean, abs=1e-12)


def dawson(x: float) -> float:
    """exp(-x^2) times the integral of exp(u^2) from 0 to x, by the midpoint rule."""
    u = (torch.arange(200_000, dtype=F64) + 0.5) * (x / 200_000)
    return (torch.exp(u**2 - x**2).sum() * (x / 200_000)).item()


@pytest.mark.parametrize(("std", "sigma_y"), [(1, 0.5), (0.5, 0.5), (2, 0.5)])
def test_dps_in_bayes_form_ends_where_its_closed_forms_say(std: float, sigma_y: float) -> None:
    """The ODE loses the variance, the SDE half of it: the price of taking p(y | x0) for p(y | x_t)."""
    k = std**2 / (2 * sigma_y**2)
    mean, variance = ends_of(DPSBayes(), std, sigma_y)
    assert mean == pytest.approx(2 * k**0.5 * dawson(k**0.5), rel=0.01)
    assert variance == pytest.approx(std**2 * math.exp(-2 * k), rel=0.05 if k > 4 else 0.01)
    mean, variance = ends_of(DPSBayes(), std, sigma_y, DPMppSDE2M())
    assert mean == pytest.approx(1 - math.exp(-2 * k), rel=0.01)
    assert variance == pytest.approx(sigma_y**2 / 2 * (1 - math.exp(-4 * k)), rel=0.01)


def test_the_closed_forms_are_the_tables() -> None:
    k = torch.tensor([2.0, 200.0, 0.5, 8.0], dtype=F64)
    means = [2 * value**0.5 * dawson(value**0.5) for value in k.tolist()]
    assert means == pytest.approx([1.279976, 1.002519, 0.724778, 1.081585], abs=1e-6)


PIGDM = [(1, 0.5, (0.8, 0.2), (0.8, 0.2)), (1, 0.05, (0.997506, 0.00249377), (0.997506, 0.00249377)),
         (0.5, 0.5, (0.37297, 0.14134), (0.43462, 0.13100)), (2, 0.5, (1.15899, 0.03822), (0.99045, 0.19790))]


@pytest.mark.parametrize(("std", "sigma_y", "ode", "sde"), PIGDM)
def test_pigdm_is_exact_on_unit_data_only(
    std: float, sigma_y: float, ode: tuple[float, float], sde: tuple[float, float]
) -> None:
    assert ends_of(PiGDM(), std, sigma_y) == pytest.approx(ode, rel=0.01)
    assert ends_of(PiGDM(), std, sigma_y, DPMppSDE2M()) == pytest.approx(sde, rel=0.01)


@pytest.mark.parametrize(("std", "sigma_y"), [(1, 0.5), (1, 0.05), (0.5, 0.5), (2, 0.5)])
def test_tmpd_is_exact_on_every_gaussian(std: float, sigma_y: float) -> None:
    exact = std**2 / (std**2 + sigma_y**2), std**2 * sigma_y**2 / (std**2 + sigma_y**2)
    for sampler in (ODE, DPMppSDE2M()):
        assert ends_of(TMPD(), std, sigma_y, sampler) == pytest.approx(exact, rel=0.01)


def coverage(std: float, sigma_y: float, mean: float, variance: float) -> float:
    """How often x0 lies in the central 90 % of N(mean y, variance), over (x0, y)."""
    spread = ((1 - mean) * std) ** 2 + (mean * sigma_y) ** 2
    return math.erf(1.6448536 * (variance / spread / 2) ** 0.5)


def test_coverage_of_nine_in_ten() -> None:
    """Right coverage is no proof of a right mean: pigdm's on data of std .5 is."""
    assert coverage(1, 0.5, *ends_of(TMPD(), 1, 0.5)) == pytest.approx(0.900, abs=2e-3)
    assert coverage(1, 0.5, *ends_of(DPSBayes(), 1, 0.5, DPMppSDE2M())) == pytest.approx(0.763, abs=2e-3)
    assert coverage(1, 0.5, *ends_of(DPSBayes(), 1, 0.5)) == pytest.approx(0.250, abs=2e-3)
    assert coverage(1, 0.05, 1, 0.00125) == pytest.approx(0.755, abs=1e-3)
    assert coverage(1, 0.05, *ends_of(DPSBayes(), 1, 0.05)) < 1e-3
    assert coverage(0.5, 0.5, *ends_of(PiGDM(), 0.5, 0.5)) == pytest.approx(0.910, abs=2e-3)
    assert coverage(0.5, 0.5, *ends_of(PiGDM(), 0.5, 0.5, DPMppSDE2M())) == pytest.approx(0.905, abs=2e-3)


@pytest.mark.parametrize(
    ("rule", "mean", "variances", "cross"),
    [(TMPD(), (0.990099, 0.891089), (0.009901, 0.198020), 0.008911),
     (PiGDM(), (0.966413, 0.836630), (0.018233, 0.242057), None),
     (DPSBayes(), (1.003312, 1.078053), (0.000279, 0.134268), None)],
)
def test_two_correlated_numbers_of_which_one_is_seen(
    rule: Measurement, mean: tuple[float, float], variances: tuple[float, float], cross: float | None
) -> None:
    schedule = EDM(sigma_max=1000)
    grid = Exponential(sigma_min=1e-3, sigma_max=1000)(200, schedule)
    x = torch.cat([torch.zeros(1, 2, dtype=F64), 1000 * torch.eye(2, dtype=F64)])
    drawn = sample(ODE, rule(correlated(schedule), FIRST, ONE, 0.1), x, grid, Noise.from_seeds([0] * 3))
    map_ = drawn[1:] - drawn[0]
    covariance = map_.T @ map_
    torch.testing.assert_close(drawn[0], torch.tensor(mean, dtype=F64), rtol=0, atol=1e-3)
    torch.testing.assert_close(covariance.diag(), torch.tensor(variances, dtype=F64), rtol=0, atol=1e-3)
    assert cross is None or covariance[0, 1].item() == pytest.approx(cross, abs=5e-4)


class OneAxis(Impulses):
    """Impulses on one coordinate."""

    def __init__(self, batch: int, axis: int) -> None:
        super().__init__(batch)
        object.__setattr__(self, "axis", axis)

    def fold(self, *key: int | str) -> OneAxis:
        return self

    def normal(self, shape: torch.Size, *key: int | str, dtype: torch.dtype = F64) -> Tensor:  # type: ignore[override]
        whole = super().normal(shape, *key, dtype=dtype)
        return torch.where(torch.arange(shape[-1]) == self.axis, whole, 0)  # type: ignore[attr-defined]


def ancestral(data: Mixture, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and variances of ddnm by ddpm, the first coordinate being 1 without noise."""
    grid, variance = Linspace()(steps, data.schedule), torch.zeros(2, dtype=F64)
    for axis in (0, 1):
        x = torch.zeros(len(grid) + 2, 2, dtype=F64)
        x[-1, axis] = 1
        drawn = sample(DDPM(), DDNM()(data, FIRST, ONE, 0.0), x, grid, OneAxis(len(x), axis))
        variance += (drawn - drawn[0]).square().sum(0)
    return drawn[0], variance


@pytest.mark.parametrize(
    ("steps", "mean", "variance"), [(50, 0.602324, 0.319440), (250, 0.622040, 0.346413)]
)
def test_ddnm_of_two_correlated_numbers(steps: int, mean: float, variance: float) -> None:
    """What is seen is y to the bit; of the other .9 and .19 would be exact."""
    found, variances = ancestral(correlated(DDPMLinear()), steps)
    assert found[0].item() == 1 and variances[0].item() == 0
    assert found[1].item() == pytest.approx(mean, abs=1e-6)
    assert variances[1].item() == pytest.approx(variance, abs=1e-6)


def test_ddnm_leaves_what_is_unseen_and_independent_alone() -> None:
    """N(0, 1) up to the sampler's own error."""
    schedule = DDPMLinear()
    found, variances = ancestral(gaussian(schedule, 1.0, dim=2), 50)
    assert found.tolist() == [1, 0] and variances[0].item() == 0
    assert variances[1].item() == pytest.approx(final_variance(DDPM(), schedule, Linspace()(50, schedule), 1.0, 1.0))


MIXTURES = [(TMPD(), 1, 0.5, 0.50356), (PiGDM(), 1, 0.5, 0.53703), (DPSBayes(), 1, 0.5, 0.67959),
            (TMPD(), 0.5, 0.25, 0.58343), (PiGDM(), 0.5, 0.25, 0.65145), (DPSBayes(), 0.5, 0.25, 0.97403)]


@pytest.mark.parametrize(("rule", "sigma_y", "y", "expected"), MIXTURES)
def test_of_two_modes_by_where_the_ode_parts(rule: Measurement, sigma_y: float, y: float, expected: float) -> None:
    """Off Gaussians none is exact, tmpd no better than the others: .52853 and .70617 would be."""
    schedule = EDM(sigma_max=1000)
    data = Mixture(schedule, torch.tensor([0.3, 0.7], dtype=F64), torch.tensor([[1.0], [-1.0]], dtype=F64),
                   torch.full((2, 1, 1), 0.04, dtype=F64))
    low, high = -4.0, 4.0
    for _ in range(2):
        z = torch.linspace(low, high, 41, dtype=F64)[:, None]
        grid = Exponential(sigma_min=1e-2, sigma_max=1000)(100, schedule)
        end = sample(ODE, rule(data, SEEN, y * ONE, sigma_y), 1000 * z, grid, Noise.from_seeds([0] * 41))
        first = int((end > 0).flatten().int().argmax())
        low, high = z[first - 1].item(), z[first].item()
    assert 0.5 * math.erfc((low + high) / 2 / 2**0.5) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("schedule", [EDM(), VP(), Flow()], ids=repr)
def test_the_pair_makes_up_x_again_and_samples_stay_apart(rule: Measurement, schedule: NoiseSchedule) -> None:
    x, y, denoise = draws(0, 5, 1, 1, 2) * schedule.prior_std, draws(1, 5, 1, 1, 2), shaped(two_modes(schedule))
    operator = latent(draws(2, 2, 2), draws(3, 2, 2))
    for time in (scalar(0.2), scalar(1.0)):
        (alpha, sigma), ends = schedule(time), rule(denoise, operator, y, 0.3)(x, time)
        torch.testing.assert_close(alpha * ends.x0 + sigma * ends.eps, x, rtol=1e-9, atol=1e-9)
        parts = [rule(denoise, operator, y[part], 0.3)(x[part], time).x0 for part in (slice(0, 2), slice(2, 5))]
        torch.testing.assert_close(torch.cat(parts), ends.x0, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_at_pure_noise_the_first_step_is_not_wasted(rule: Measurement) -> None:
    """L is r^2 I = I at alpha = 0, the limit on unit data."""
    rule = replace(rule, prior_weight=1) if isinstance(rule, DiffPIR) else rule
    rule = replace(rule, gamma=0) if isinstance(rule, PSLD) else rule
    denoise = rule(shaped(gaussian(Flow(), 1.0)), latent(ONE, ONE, 0.0), ONE[None, None], 0.5)
    x = draws(4, 3, 1, 1, 1)
    torch.testing.assert_close(denoise(x, scalar(1.0)).x0, denoise(x, scalar(1 - 1e-9)).x0, rtol=1e-6, atol=1e-6)
    assert denoise(x, scalar(1.0)).x0[0].item() == pytest.approx(4 if isinstance(rule, Descent) else 0.8)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_sigma_is_the_covariance_of_x0_and_symmetric(t: float) -> None:
    """(sigma^2 / alpha) dx0/dx_t, on a mixture: within components and between them."""
    data, x, (alpha, sigma) = two_modes(Flow()), draws(5, 4, 2), Flow()(scalar(t))
    belief = by_jacobian(data, x, scalar(t))
    columns = [belief.spread(axis.expand(4, 2)) for axis in torch.eye(2, dtype=F64)]
    found = torch.stack(columns, dim=1)
    _, share, _, x0 = data._components(x, scalar(t))
    system = alpha**2 * data.covariances + sigma**2 * torch.eye(2, dtype=F64)
    within = data.covariances - alpha**2 * data.covariances @ torch.linalg.solve(system, data.covariances)
    off = x0 - (share * x0).sum(1, keepdim=True)
    exact = (share[..., None] * (within + off[..., None] * off[..., None, :])).sum(1)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(found, found.mT)


@pytest.mark.parametrize("rule", [rule for rule in RULES if not isinstance(rule, PSLD)], ids=lambda rule: rule.kind)
def test_after_a_linear_decoder_all_is_as_with_the_product(rule: Measurement) -> None:
    """By automatic differentiation and conjugate gradients, what the closed form of A W gives."""
    left, right = draws(6, 3, 4), draws(7, 4, 2)
    x, y, denoise = draws(8, 5, 1, 1, 2), draws(9, 5, 1, 1, 3), shaped(two_modes(VP()))
    for t in (0.2, 0.7):
        closed, derived = (rule(denoise, operator, y, 0.3)(x, scalar(t)).x0
                           for operator in (Matrix(matrix=left @ right), latent(left, right, 0.0)))
        torch.testing.assert_close(derived, closed, rtol=1e-8, atol=1e-8)


def test_psld_with_an_orthonormal_decoder_is_dps_as_often_as_both_weights() -> None:
    """Where also A A^T = I, both errors are |y - A D(z)|^2."""
    right, rows = torch.linalg.qr(draws(19, 4, 4)).Q, torch.linalg.qr(draws(20, 4, 2)).Q.T
    x, y, denoise, t = draws(21, 5, 1, 1, 4), draws(22, 5, 1, 1, 2), Isotropic(VP(), 0.7), scalar(0.4)
    operator, plain = latent(rows, right, 0.0), denoise(x, t).x0
    dps = DPSBayes()(denoise, operator, y, 0.3)(x, t).x0 - plain
    for omega, gamma in ((1.0, 0.1), (0.0, 2.0), (0.3, 0.0)):
        psld = PSLD(omega=omega, gamma=gamma)(denoise, operator, y, 0.3)(x, t).x0 - plain
        torch.testing.assert_close(psld, (omega + gamma) * dps)


def test_psld_draws_to_where_the_encoder_puts_what_y_corrects() -> None:
    """|z - E(A^T y + (I - A^T A) D(z))|^2 / 2, with an encoder that is not the decoder's inverse."""
    rows, right, left = draws(31, 2, 4), draws(32, 4, 4), draws(33, 4, 4)
    linear, y, z = Matrix(matrix=rows), draws(34, 5, 1, 1, 2), draws(35, 5, 1, 1, 4)
    operator = Decoded(linear, lambda x: x @ right.T, (1, 1, 4), lambda x: x @ left.T)
    corrected = y @ rows + (z @ right.T) @ (torch.eye(4, dtype=F64) - rows.T @ rows)
    wanted = (z - corrected @ left.T).square().sum() / 2
    torch.testing.assert_close(PSLD(omega=0.0, gamma=1.0).error(operator, z, y), wanted)


def test_gauss_newton_walks_to_the_most_likely_x0() -> None:
    """Of |y - A(x)|^2 / sigma_y^2 + |x - x0|^2 / r^2, where the gradient is 0."""
    operator = latent(draws(10, 3, 2), draws(11, 2, 2) / 2)
    x, y, denoise, t = draws(12, 4, 1, 1, 2), draws(13, 4, 1, 1, 3) / 2, Isotropic(Flow(), 1.0), scalar(0.5)
    x0, spread = denoise(x, t).x0, 0.5
    found = DDNM(iterations=50)(denoise, operator, y, 0.5)(x, t).x0
    local = linearised(operator, found, 10)
    torch.testing.assert_close(local.adjoint(y - local.value) / 0.25, (found - x0) / spread, rtol=1e-7, atol=1e-7)


def test_conjugate_gradients_keep_samples_apart_and_stop() -> None:
    root = draws(14, 4, 3, 3)
    system = root @ root.mT + 0.1 * torch.eye(3, dtype=F64)
    b = draws(15, 4, 3)
    b[1] = 0
    calls = []

    def apply(v: Tensor) -> Tensor:
        calls.append(len(v))
        return (system[: len(v)] @ v[..., None])[..., 0]

    torch.testing.assert_close(conjugate_gradients(apply, b, 50), torch.linalg.solve(system, b), rtol=1e-8, atol=1e-8)
    assert len(calls) < 50
    short = conjugate_gradients(apply, b, 2)
    torch.testing.assert_close(conjugate_gradients(apply, b[:1], 2), short[:1])
    assert bool((conjugate_gradients(lambda v: -v, b, 5) == 0).all())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_sampling_runs_without_gradients_and_keeps_none(rule: Measurement) -> None:
    schedule, operator = VE(), latent(draws(2, 2, 2), draws(3, 2, 2))
    denoise, noise = rule(shaped(two_modes(schedule)), operator, draws(1, 1, 1, 1, 2), 0.3), Noise.from_seeds([1, 2, 3])
    drawn = sample(DDPM(), denoise, 50 * draws(16, 3, 1, 1, 2), Exponential()(5, schedule), noise)
    assert drawn.shape == (3, 1, 1, 2) and not drawn.requires_grad
    assert all(not part.requires_grad for part in denoise(drawn, scalar(0.5))[:2])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_inference_mode_is_refused_where_derivatives_are_needed(rule: Measurement) -> None:
    """By ddnm and diffpir only after a decoder: a linear operator needs none there."""
    x, y, t = draws(17, 1, 1, 1, 2), draws(1, 1, 1, 1, 2), scalar(0.5)
    operator, denoise = latent(draws(2, 2, 2), draws(3, 2, 2)), shaped(two_modes(VP()))
    with torch.inference_mode():
        with pytest.raises(ValueError, match="torch.no_grad"):
            rule(denoise, operator, y, 0.3)(x, t)
        if isinstance(rule, DDNM | DiffPIR):
            assert rule(denoise, operator.operator, y, 0.3)(x, t).x0.shape == x.shape


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="sigma_y"):
        DDNM()(two_modes(VP()), FIRST, ONE, -1.0)
    with pytest.raises(ValueError, match="ddnm, pigdm, diffpir or tmpd"):
        DPSBayes()(two_modes(VP()), FIRST, ONE, 0.0)
    with pytest.raises(ValueError, match="prior_weight"):
        DiffPIR(prior_weight=0.0)
    decoded = latent(ONE, ONE)
    for operator in (FIRST, replace(decoded, encode=None), replace(decoded, operator=Phase())):
        with pytest.raises(ValueError, match="ddnm, pigdm, dps-bayes, tmpd and diffpir take any operator"):
            PSLD()(Isotropic(VP()), operator, ONE[None, None], 0.3)
    with pytest.raises(ValueError, match="psld divides by sigma_y"):
        PSLD()(Isotropic(VP()), decoded, ONE[None, None], 0.0)
