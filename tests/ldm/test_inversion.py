"""From a picture to its noise and back: by a fixed point, by the noise of an ancestral sampler, and from half way."""

from __future__ import annotations

import pytest
import torch
from conditional import Exact, cond
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Denoise
from ldm.diffusion import Denoised
from ldm.exact import F64, Counted, Impulses, Isotropic, Smooth, end_of_ode, gaussian, marginal, scalar, two_modes
from ldm.grids import Uniform
from ldm.guidance import ClassifierFree
from ldm.inversion import Recorded, edit_friendly
from ldm.noise import Noise
from ldm.samplers import DDIM, DDPM, RK4, DDIMInversion, DPMpp2M, Euler, Sampler, mix, sample
from ldm.schedules import EDM, VE, VP, DDPMLinear, DDPMScaledLinear, Flow, NoiseSchedule

ONE, TWO = Noise.from_seeds([0]), Noise.from_seeds([3, 4])
TABLE = torch.cat([torch.zeros(1, dtype=F64), torch.arange(1, 982, 20, dtype=F64)]) / 1000


@pytest.mark.parametrize(("iterations", "back"), [(1, 0.9983563), (2, 0.9998928), (3, 0.9999914), (4, 0.99999921)])
def test_more_iterations_come_nearer_to_the_way_back(iterations: int, back: float) -> None:
    counted, x = Counted(Isotropic(DDPMLinear(), 1.0)), torch.ones(1, 1, dtype=F64)
    inversion = DDIMInversion(iterations=iterations)
    noised = sample(inversion, counted, x, TABLE, ONE)
    assert len(counted.times) == 50 * inversion.calls
    returned = sample(DDIM(), counted, noised, TABLE.flip(0), ONE).item()
    assert returned == pytest.approx(back, abs=5e-8 if iterations < 4 else 5e-9)


def test_the_fixed_point_is_the_exact_inverse() -> None:
    oracle = two_modes(DDPMLinear())
    noised = sample(DDIMInversion(iterations=20), oracle, torch.ones(1, 2, dtype=F64), TABLE, ONE)
    back = sample(DDIM(), oracle, noised, TABLE.flip(0), ONE)
    torch.testing.assert_close(back, torch.ones_like(back), rtol=0, atol=1e-12)
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="ddim-inversion iterations"):
            DDIMInversion(iterations=wrong)  # type: ignore[arg-type]


def test_one_iteration_is_the_rule_with_eps_of_x_bit_for_bit() -> None:
    x, (t, s), oracle = torch.ones(1, 1, dtype=F64), map(scalar, (0.301, 0.321)), Smooth(DDPMLinear())
    (alpha, sigma), level = oracle.schedule(t), oracle.schedule(s)
    keep = level.alpha / alpha
    wanted = keep * x + (level.sigma - keep * sigma) * oracle(x, s).eps
    assert torch.equal(DDIMInversion().step(oracle, x, t, s, None, ONE)[0], wanted)


def test_an_iteration_contracts_as_its_step_says() -> None:
    """On N(0, 1) eps is sigma x: gaps to the fixed point shrink by sigma_s (sigma_s - alpha_s sigma_t / alpha_t)."""
    levels, oracle = DDPMLinear()(TABLE), Isotropic(DDPMLinear(), 1.0)
    keep = levels.alpha[1:] / levels.alpha[:-1]
    shrinks = levels.sigma[1:] * (levels.sigma[1:] - keep * levels.sigma[:-1])
    assert shrinks.max().item() == pytest.approx(0.1782, abs=5e-5)
    at = int(shrinks.argmax())
    x = [DDIMInversion(iterations=n).step(oracle, torch.ones(1, 1, dtype=F64), TABLE[at], TABLE[at + 1], None, ONE)[0]
         for n in (1, 2, 3)]
    assert ((x[2] - x[1]) / (x[1] - x[0])).item() == pytest.approx(shrinks.max().item())


def test_eps_at_its_own_time_does_not_come_back() -> None:
    oracle = Isotropic(DDPMLinear(), 1.0)
    noised = sample(DDIM(), oracle, torch.ones(1, 1, dtype=F64), TABLE, ONE)
    assert sample(DDIM(), oracle, noised, TABLE.flip(0), ONE).item() == pytest.approx(0.929449, abs=5e-7)


class Captioned(Exact):
    """N(1, 1/4) with its caption, N(0, 5/4) without."""

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        told, free = Isotropic(self.schedule, 0.5, 1.0)(x, t), Isotropic(self.schedule, 1.25**0.5)(x, t)
        share = cond.context[:, 0].to(x.dtype)
        return Denoised(torch.lerp(free.x0, told.x0, share), torch.lerp(free.eps, told.eps, share))


@pytest.mark.parametrize(("scale", "mean", "slope"), [(1.0, 1.0, 1.0), (1.5, 1.2098675, 0.6687403),
                                                      (2.0, 1.3228067, 0.4472136), (3.0, 1.4, 0.2)])
def test_guidance_does_not_walk_back_what_was_inverted_without_it(scale: float, mean: float, slope: float) -> None:
    x, grid = torch.tensor([[1.0], [2.0]], dtype=F64), torch.linspace(0, 1, 101, dtype=F64)
    captioned = Captioned(Flow(t_min=0.0))
    noised = sample(RK4(variable="t"), captioned.bind(cond(1, 2)), x, grid, TWO)
    guided = ClassifierFree(scale=scale)(captioned, cond(1, 2), cond(0, 1))
    at_one, at_two = sample(RK4(variable="t"), guided, noised, grid.flip(0), TWO).flatten().tolist()
    assert (at_one, at_two - at_one) == pytest.approx((mean, slope), abs=1e-6)


class Curved(Exact):
    """Not linear in x, and told apart by its condition; with a learned variance."""

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        ends, alpha = Smooth(self.schedule)(x + cond.context[:, 0].to(x.dtype), t), self.schedule(t).alpha
        return Denoised(ends.x0, (x - alpha * ends.x0) / self.schedule(t).sigma, torch.sigmoid(x))


ANCESTRAL = [DDPM(), DDPM(variance="large"), DDPM(variance="learned"), DDIM(eta=1), DDIM(eta=0.3)]
SOURCE = Noise.from_seeds([7, 8]).normal((5,), "source", dtype=F64)


def guided(schedule: NoiseSchedule, scale: float, flag: float = 1.0) -> Denoise:
    return ClassifierFree(scale=scale)(Curved(schedule), cond(flag, 2), cond(0, 1))


@pytest.mark.parametrize("schedule", [VP(), EDM(), Flow(), DDPMLinear()], ids=repr)
@pytest.mark.parametrize("sampler", ANCESTRAL, ids=repr)
def test_an_unchanged_sampler_draws_the_source_again(sampler: Sampler, schedule: NoiseSchedule) -> None:
    """At any scale and from any time of the grid; bit-equal runs but for the residual's own rounding."""
    for scale in (1.0, 15.0):
        for skip in (0, 4, 9):
            grid = Uniform()(10, schedule)[skip:]
            counted = Counted(guided(schedule, scale))
            found = edit_friendly(sampler, counted, SOURCE, grid, TWO)
            assert len(counted.times) == 10 - skip
            torch.testing.assert_close(found.walk(guided(schedule, scale)), SOURCE, rtol=0, atol=1e-12)
            bare = sample(sampler, guided(schedule, scale), found.start, grid, found.noise)
            torch.testing.assert_close(bare + found.residual, SOURCE, rtol=0, atol=1e-12)


def test_single_precision_draws_it_too() -> None:
    found = edit_friendly(DDPM(), guided(VP(), 7.5), SOURCE.float(), Uniform()(50, VP()), TWO)
    torch.testing.assert_close(found.walk(guided(VP(), 7.5)), SOURCE.float(), rtol=0, atol=1e-5)


def test_another_caption_edits_it_and_a_later_start_less() -> None:
    changes = []
    for skip in (0, 10, 18):
        found = edit_friendly(DDPM(), guided(Flow(), 1), SOURCE, Uniform()(20, Flow())[skip:], TWO)
        changes.append((found.walk(guided(Flow(), 1, flag=2.0)) - SOURCE).abs().mean().item())
    assert changes[0] > changes[1] > changes[2] > 1e-4


def test_a_later_start_has_the_same_x_and_a_batch_is_its_samples() -> None:
    denoise, grid = two_modes(VP()), Uniform()(10, VP())
    whole = edit_friendly(DDPM(), denoise, SOURCE[:, :2], grid, TWO)
    later = edit_friendly(DDPM(), denoise, SOURCE[:, :2], grid[6:], TWO)
    torch.testing.assert_close(later.noise.draws, whole.noise.draws[6:])
    alone = edit_friendly(DDPM(), denoise, SOURCE[1:, :2], grid, TWO[1:])
    torch.testing.assert_close(alone.noise.draws, whole.noise[1:].draws)
    torch.testing.assert_close(alone.walk(denoise), SOURCE[1:, :2])


def test_extracted_noise_has_more_than_unit_variance() -> None:
    """As two independent x of one source on N(0, 1/4) say: z = (x_s - a x_t) / std, a the slope of the mean."""
    schedule, grid, noise = Flow(), Uniform()(10, Flow())[4:], Noise.from_seeds([1])
    source = 0.5 * noise.normal((4096,), "data", dtype=F64)
    draws = edit_friendly(DDPM(), Isotropic(schedule), source, grid, noise).noise.draws
    for t, s, z in zip(grid, grid[1:-1], draws, strict=False):
        (alpha, sigma), level = schedule(t), schedule(s)
        e = alpha * level.sigma / (level.alpha * sigma)
        slope = (level.alpha * alpha / 4 + level.sigma * e * sigma) / marginal(schedule, t, 0.5)
        spread = level.sigma**2 * (1 - e**2)
        wanted = ((level.alpha - slope * alpha) ** 2 / 4 + level.sigma**2 + (slope * sigma) ** 2) / spread
        assert z.var().item() == pytest.approx(wanted.item(), rel=0.08) and wanted > 1.2


def test_what_edit_friendly_inversion_cannot_do_is_refused() -> None:
    grid = Uniform()(4, VP())
    for sampler in (DDIM(), DPMpp2M()):
        with pytest.raises(ValueError, match="take ddpm"):
            edit_friendly(sampler, Smooth(VP()), SOURCE, grid, TWO)
    with pytest.raises(ValueError, match="falls to 0"):
        edit_friendly(DDPM(), Smooth(VP()), SOURCE, grid[:-1], TWO)
    noise = edit_friendly(DDPM(), Smooth(VP()), SOURCE, grid, TWO).noise
    assert isinstance(noise, Recorded) and len(noise) == 2 and noise.draws.shape == (3, 2, 5)
    with pytest.raises(ValueError, match="of steps alone"):
        noise.fold("churn", 0)
    for shape, key in (((4,), ()), ((5,), ("second",))):
        with pytest.raises(ValueError, match="one draw a step"):
            noise.fold("step", 0).normal(shape, *key)
    with pytest.raises(ValueError, match="one draw a step"):
        sample(DDPM(), Smooth(VP()), SOURCE, Uniform()(8, VP()), noise)


def kept(sampler: Sampler, start: float, steps: int) -> tuple[float, float]:
    """How much of a source and of a unit of noise is left after a walk from x_t = alpha x_src + sigma eps, on flow."""
    schedule, batch = Flow(t_min=0.0), 2 + steps
    grid, source = torch.linspace(start, 0, steps + 1, dtype=F64), torch.zeros(batch, 1, dtype=F64)
    eps, source[0] = torch.zeros_like(source), 1
    eps[-1] = 1
    # Sample 0 is the source alone, the last the starting noise, those between one draw of the sampler each.
    walked = sample(sampler, Isotropic(schedule), mix(schedule(grid[0]), Denoised(source, eps)), grid, Impulses(batch))
    return walked[0].item(), walked[1:].square().sum().sqrt().item()


LEFT = [(0.6, (0.316228, 0.474342), (0.1, 0.497494)), (0.8, (0.124035, 0.496139), (0.015385, 0.499941)),
        (0.3, (0.759257, 0.325396), (0.576471, 0.408559))]


@pytest.mark.parametrize(("start", "ode", "ancestral"), LEFT)
def test_what_a_start_below_one_keeps_of_its_source(
    start: float, ode: tuple[float, float], ancestral: tuple[float, float]
) -> None:
    """alpha s / sqrt(V) by the ODE and its square by an ancestral walk, whose noise is extrapolated to no step size;
    over the data both have the variance s^2."""
    schedule = Flow()
    exact = schedule(scalar(start)).alpha.item() * 0.5 / marginal(schedule, scalar(start), 0.5) ** 0.5
    assert (exact, exact**2) == pytest.approx((ode[0], ancestral[0]), abs=1e-6)
    assert kept(RK4(variable="t"), start, 100) == pytest.approx(ode, abs=1e-6)
    coarse, middle, fine = (kept(DDPM(), start, steps) for steps in (100, 200, 400))
    assert coarse[0] == pytest.approx(ancestral[0], abs=1e-6)
    assert (8 * fine[1] - 6 * middle[1] + coarse[1]) / 3 == pytest.approx(ancestral[1], abs=5e-5)
    for source, noise in (ode, ancestral):
        assert source**2 / 4 + noise**2 == pytest.approx(1 / 4, abs=1e-6)


def test_ten_euler_steps_of_a_start_below_one() -> None:
    assert kept(Euler(), 0.6, 10) == pytest.approx((0.291688, 0.437533), abs=1e-6)


@pytest.mark.parametrize(("schedule", "std", "leak"), [
    (DDPMScaledLinear(), 1.0, 0.0682649), (DDPMLinear(), 1.0, 0.0063528), (VP(), 1.0, 0.0065716), (Flow(), 1.0, 0.0),
    (DDPMScaledLinear(zero_terminal_snr=True), 1.0, 0.0), (VE(), 0.5, 0.0100),
], ids=repr)
def test_a_source_that_is_noised_to_the_very_end_shows_through(
    schedule: NoiseSchedule, std: float, leak: float
) -> None:
    """So a start at t = 1 is the prior alone, never alpha(1) x_src + sigma(1) eps."""
    t = scalar(1.0)
    x = schedule(t).alpha * torch.tensor([[0.0], [1.0]], dtype=F64)
    nothing, shown = end_of_ode(lambda process: gaussian(process, std), schedule, x, t).flatten().tolist()
    assert shown - nothing == pytest.approx(leak, abs=1e-6)
