from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch
from looping import each
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.diffusion import Denoised, Diffusion
from ldm.exact import (
    F64,
    Beside,
    Counted,
    Isotropic,
    Smooth,
    final_variance,
    fitted_order,
    gaussian,
    marginal,
    scalar,
    two_modes,
)
from ldm.grids import Karras, Uniform
from ldm.noise import Noise
from ldm.predictions import PREDICTIONS
from ldm.samplers import (
    DDIM,
    DDPM,
    DEIS,
    IPNDM,
    LMS,
    SAMPLERS,
    DPMpp2M,
    DPMpp2S,
    DPMpp3M,
    DPMpp3S,
    DPMppSDE2M,
    DPMppSDE3M,
    DPMSolver2,
    DPMSolver3,
    Euler,
    Heun,
    Sampler,
    Snapshot,
    UniPC,
    check_grid,
    mix,
    prior,
    sample,
)
from ldm.schedules import EDM, SCHEDULES, VE, VP, Flow, NoiseSchedule, Table

ENDS: list[NoiseSchedule] = [cls() for cls in SCHEDULES] + [
    cls(zero_terminal_snr=True) for cls in SCHEDULES if issubclass(cls, Table)
]  # type: ignore[call-arg]
every_sampler = pytest.mark.parametrize("sampler", [cls() for cls in SAMPLERS], ids=repr)
every_schedule = each("schedule", ENDS)
ONE = Noise.from_seeds([0])


# Every sampler on every process


def data(sampler: Sampler, schedule: NoiseSchedule) -> Denoise:
    """Two modes; for samplers of few-step models one, on which exact jumps are known."""
    return Isotropic(schedule, 0.5, 0.3) if sampler.jumps else two_modes(schedule)


@every_schedule
@every_sampler
def test_the_data_come_out_on_every_process_and_prediction(sampler: Sampler, schedule: NoiseSchedule) -> None:
    """64 steps (192) give N(0, 1/4) its variance within what the order allows; every allowed prediction agrees."""
    # Langevin dynamics need many levels.
    std, grid = 0.5, Karras()(192 if sampler.kind == "langevin" else 64, schedule)
    variance = final_variance(sampler, schedule, grid, std, marginal(schedule, scalar(1.0), std) ** 0.5)
    assert variance == pytest.approx(std**2, rel=0.3 if sampler.order < 2 else 0.03)
    # The same three samples with the oracle as it is and, beside them, through each prediction.
    diffusions = [Diffusion(schedule=schedule, prediction=cls()) for cls in PREDICTIONS if not cls().refusal(schedule)]
    noise = Noise.from_seeds([1, 2, 3] * (1 + len(diffusions)))
    x, oracle = prior(schedule, (2,), noise, dtype=F64), Beside(data(sampler, schedule), diffusions)
    direct, *others = sample(sampler, oracle, x, Uniform()(6, schedule), noise).split(3)
    # x0 = (x - sigma eps) / alpha costs 1 / alpha at t = 1, and that is all.
    slack = 1e-11 / max(schedule(scalar(1.0)).alpha.item(), 1e-3)
    for diffusion, through in zip(diffusions, others, strict=True):
        torch.testing.assert_close(through, direct, rtol=slack, atol=slack, msg=lambda m, d=diffusion: f"{d}: {m}")


@every_schedule
@pytest.mark.parametrize("sampler", [cls() for cls in SAMPLERS if cls().order], ids=repr)
def test_order_of_convergence(sampler: Sampler, schedule: NoiseSchedule) -> None:
    """The error of the variance from log-SNR -4.6 to 4.6, on a log grid, falls with the order the sampler declares."""
    counts, errors = [24, 48, 96] if sampler.order < 4 else [16, 32, 64], []
    for steps in counts:
        grid = schedule.time(torch.linspace(-4.6, 4.6, steps + 1, dtype=F64))
        variance = final_variance(sampler, schedule, grid, 0.5, marginal(schedule, grid[0], 0.5) ** 0.5)
        errors.append(abs(variance - marginal(schedule, grid[-1], 0.5)))
    assert fitted_order(counts, errors) > sampler.order - 0.25


@every_schedule
@every_sampler
def test_one_step_and_two_reach_a_finite_sample(sampler: Sampler, schedule: NoiseSchedule) -> None:
    noise = Noise.from_seeds([4, 5])
    for steps in (1, 2):
        for dtype in (torch.float32, torch.bfloat16):
            x = prior(schedule, (3,), noise, dtype=dtype)
            drawn = sample(sampler, Smooth(schedule), x, Uniform()(steps, schedule), noise)
            assert drawn.dtype == dtype and bool(drawn.isfinite().all())


@every_sampler
@each("schedule", [Flow(), VP(), EDM()])
def test_a_sample_does_not_depend_on_its_batch(sampler: Sampler, schedule: NoiseSchedule) -> None:
    noise = Noise.from_seeds([7, 8, 9, 10, 11])
    x, grid = prior(schedule, (2, 3), noise, dtype=F64), Uniform()(9, schedule)
    whole = sample(sampler, Smooth(schedule), x, grid, noise)
    parts = [sample(sampler, Smooth(schedule), x[part], grid, noise[part]) for part in (slice(0, 1), slice(1, 5))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


@every_schedule
@every_sampler
def test_the_network_is_called_as_often_as_declared_and_where_it_may_be(
    sampler: Sampler, schedule: NoiseSchedule
) -> None:
    counted, noise = Counted(data(sampler, schedule)), Noise.from_seeds([1])
    sample(sampler, counted, prior(schedule, (2,), noise, dtype=F64), Uniform()(10, schedule), noise)
    assert len(counted.times) >= 10 and (not sampler.calls or len(counted.times) <= 10 * sampler.calls + 1)
    assert min(counted.times) >= schedule.t_min and max(counted.times) <= 1


@every_sampler
def test_watching_changes_nothing_and_shows_every_step(sampler: Sampler) -> None:
    schedule, noise = Flow(), Noise.from_seeds([1, 2])
    x, grid, seen = prior(schedule, (2,), noise), Uniform()(5, schedule), list[Snapshot]()
    watched = sample(sampler, Smooth(schedule), x, grid, noise, seen.append)
    assert torch.equal(watched, sample(sampler, Smooth(schedule), x, grid, noise))
    assert [shot.step for shot in seen] == list(range(5)) and [shot.t for shot in seen] == grid[1:].tolist()
    assert torch.equal(seen[-1].x, watched) and all(shot.x0.shape == x.shape for shot in seen)
    counted = Counted(Smooth(schedule))
    sample(sampler, counted, x, grid, noise)
    assert seen[-1].calls == len(counted.times)


@every_sampler
def test_samplers_are_frozen_configs(sampler: Sampler) -> None:
    assert dataclasses.is_dataclass(sampler) and hash(sampler) == hash(dataclasses.replace(sampler))
    assert inspect.getdoc(type(sampler)) and type(sampler).kind == sampler.kind
    assert (type(sampler.order), type(sampler.calls), type(sampler.rises)) == (int, int, bool)


def test_samples_of_a_mixture_have_its_moments() -> None:
    oracle, noise = two_modes(Flow()), Noise.from_seeds(list(range(4000)))
    exact = oracle.weights @ oracle.means
    for sampler in (DDPM(), Heun(), DPMpp2M()):
        x = sample(
            sampler, oracle, prior(oracle.schedule, (2,), noise, dtype=F64), Uniform()(40, oracle.schedule), noise
        )
        torch.testing.assert_close(x.mean(0), exact, atol=0.05, rtol=0)
        assert (x[:, 0] > 0).double().mean().item() == pytest.approx(0.3, abs=0.03)


# Identities


def same(a: Sampler, b: Sampler, schedule: NoiseSchedule, grid: Tensor) -> None:
    noise = Noise.from_seeds([1, 2, 3])
    x = prior(schedule, (2,), noise, dtype=F64)
    left, right = (sample(sampler, two_modes(schedule), x, grid, noise) for sampler in (a, b))
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@every_schedule
def test_ddim_identities(schedule: NoiseSchedule) -> None:
    grid = Uniform()(12, schedule)
    same(DDIM(eta=1.0), DDPM(), schedule, grid)
    same(DDIM(), Euler(), schedule, grid)
    same(DDIM(), Euler(variable="sigma"), schedule, grid)


@every_schedule
def test_first_order_members_of_each_family_are_ddim(schedule: NoiseSchedule) -> None:
    grid = Uniform()(12, schedule)
    for first in (
        UniPC(solver_order=1, corrector=False),
        DEIS(solver_order=1),
        LMS(solver_order=1),
        IPNDM(solver_order=1),
    ):
        same(first, DDIM(), schedule, grid)
    same(UniPC(solver_order=2, corrector=False), DPMpp2M(), schedule, grid)


MULTISTEP: list[Sampler] = [DPMpp2M(), DPMpp3M(), DPMppSDE2M(), DPMppSDE3M()]
SINGLESTEP: list[Sampler] = [DPMpp2S(), DPMpp3S(), DPMSolver2(), DPMSolver3()]


@every_schedule
@pytest.mark.parametrize("sampler", [*MULTISTEP, *SINGLESTEP], ids=repr)
def test_where_a_dpm_rule_is_of_order_one_it_is_ddim(sampler: Sampler, schedule: NoiseSchedule) -> None:
    """The first step of the multistep rules, any from pure noise, any onto t = 0; ddpm for those on the SDE."""
    first = DDPM() if sampler in (DPMppSDE2M(), DPMppSDE3M()) else DDIM()
    inside, last = torch.tensor([0.7, 0.4], dtype=F64), torch.tensor([0.3, 0.0], dtype=F64)
    same(sampler, first, schedule, last)
    if sampler in MULTISTEP:
        same(sampler, first, schedule, inside)
    if schedule.pure_noise:
        same(sampler, first, schedule, torch.tensor([1.0, 0.4], dtype=F64))


@every_schedule
@pytest.mark.parametrize("sampler", [*MULTISTEP[:2], *SINGLESTEP], ids=repr)
def test_a_dpm_rule_with_nothing_to_bend_is_ddim(sampler: Sampler, schedule: NoiseSchedule) -> None:
    """Where x0, or eps for the rules in eps, does not change, the higher orders add nothing in any number of steps."""
    still = 0.7 * torch.ones(2, 3, dtype=F64)

    class Still(Smooth):
        def __call__(self, x: Tensor, t: Tensor) -> Denoised:
            alpha, sigma = self.schedule(t)
            if sampler in (DPMSolver2(), DPMSolver3()):
                return Denoised((x - sigma * still) / alpha, still)
            return Denoised(still, (x - alpha * still) / sigma)

    # From inside, since at alpha = 0 no x0 is left that would give this eps.
    grid, x = Uniform()(12, schedule)[1:], torch.tensor([[0.3, -1.0, 2.0], [0.0, 5.0, 0.7]], dtype=F64)
    left, right = (sample(rule, Still(schedule), x, grid, Noise.from_seeds([0, 1])) for rule in (sampler, DDIM()))
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


def test_ddim_on_flow_is_euler_on_the_velocity() -> None:
    schedule = Flow()
    same(DDIM(), Euler(variable="t"), schedule, Uniform()(12, schedule))
    oracle, x = two_modes(schedule), torch.tensor([[0.7, -1.1]], dtype=F64)
    stepped, _ = DDIM().step(oracle, x, scalar(0.6), scalar(0.5), None, ONE)
    torch.testing.assert_close(stepped, x - 0.1 * oracle.velocity(x, scalar(0.6)))


@every_schedule
def test_the_prior_is_the_marginal_at_one(schedule: NoiseSchedule) -> None:
    drawn = prior(schedule, (4096,), Noise.from_seeds([3, 4]), dtype=F64)
    # EDM and VE start from sigma_max; the data's own variance is below one part in a thousand there.
    assert drawn.std().item() == pytest.approx(marginal(schedule, scalar(1.0), 1.0) ** 0.5, rel=0.03)


# Refusals


@pytest.mark.parametrize(
    "grid", [[1.0], [1.2, 0.0], [1.0, -0.1], [1.0, 0.5, 0.5, 0.0], [1.0, 0.2, 0.6], [1.0, math.nan]]
)
def test_bad_grids_are_refused(grid: list[float]) -> None:
    with pytest.raises(ValueError, match="grid"):
        check_grid(torch.tensor(grid))


@pytest.mark.parametrize(
    "build",
    [
        lambda: DDIM(eta=-0.1),
        lambda: DDIM(eta=1.1),
        lambda: DDPM(variance="medium"),
        lambda: Euler(variable="lambda"),
        lambda: sample(DDIM(), gaussian(VE()), torch.zeros(2, 1), torch.tensor([1.0, 0.0]), ONE),
        lambda: sample(DDPM(variance="learned"), gaussian(VE()), torch.zeros(1, 1), torch.tensor([1.0, 0.5]), ONE),
        lambda: sample(DDIM(eta=0.5), gaussian(VE()), torch.zeros(1, 1), torch.tensor([0.5, 1.0]), ONE),
    ],
)
def test_nonsense_is_refused(build: object) -> None:
    with pytest.raises(ValueError):
        build()  # type: ignore[operator]


def test_mix_is_the_process() -> None:
    ends = Denoised(torch.ones(1), torch.full((1,), 2.0))
    assert mix(Flow()(scalar(0.25)), ends).item() == 0.75 + 0.5
