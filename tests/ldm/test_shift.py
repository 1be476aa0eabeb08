"""Resolution shift: log-SNR less 2 ln(shift), of times where a schedule ends in pure noise, or of a table itself."""

from __future__ import annotations

import math

import pytest
import torch
from looping import each

from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.exact import F64, final_variance, marginal, scalar
from ldm.grids import Grid, Karras, Uniform
from ldm.guidance import ClassifierFree
from ldm.objectives import Denoising
from ldm.pipeline import Pipeline, Sampling
from ldm.predictions import V
from ldm.samplers import Heun, check_grid
from ldm.schedules import SCHEDULES, VP, DDPMCosine, DDPMLinear, NoiseSchedule, Table
from ldm.times import LogitNormal, TimeSampling, UniformTimes, shifted
from ldm.weighting import UniformWeight

TABLES = [cls for cls in SCHEDULES if issubclass(cls, Table)]
EVERY: list[NoiseSchedule] = [*(cls() for cls in SCHEDULES), *(cls(zero_terminal_snr=True) for cls in TABLES)]
ENDLESS = [schedule for schedule in EVERY if schedule.pure_noise]
ENDING = [schedule for schedule in EVERY if not schedule.pure_noise]
T = (torch.arange(2, 1000, 6, dtype=F64) + 0.37) / 1000  # between the entries of a table


@pytest.mark.parametrize("shift", [0.5, 3.0])
@each("schedule", ENDLESS)
def test_times_move_by_log_snr_and_the_ends_stay(schedule: NoiseSchedule, shift: float) -> None:
    moved = schedule.logsnr(shifted(T, shift, schedule))
    torch.testing.assert_close(moved, schedule.logsnr(T) - 2 * math.log(shift), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shifted(torch.tensor([0.0, 1.0], dtype=F64), shift, schedule),
                               torch.tensor([0.0, 1.0], dtype=F64), rtol=0, atol=1e-15)
    grid = check_grid(Uniform(shift=shift)(20, schedule))
    assert grid[0] == 1 and bool((grid[:-1] >= schedule.t_min * (1 - 1e-9)).all())
    trained = UniformTimes(shift=shift).sample(T, schedule)
    torch.testing.assert_close(trained, schedule.trained(shifted(T, shift, schedule)))


def objective(schedule: NoiseSchedule, times: TimeSampling) -> Denoising:
    return Denoising(diffusion=Diffusion(schedule=schedule, prediction=V()), times=times, weighting=UniformWeight())


def pipeline(schedule: NoiseSchedule, grid: Grid) -> Pipeline:
    """One that only has to be built."""
    denoiser = Denoiser(lambda x, level, cond: x, Diffusion(schedule=schedule, prediction=V()))
    plan = Sampling(sampler=Heun(), grid=grid, guidance=ClassifierFree(), steps=4)
    return Pipeline(None, denoiser, None, plan, (8, 8))  # type: ignore[arg-type]


@each("schedule", ENDING)
def test_where_less_log_snr_has_no_time_a_shift_is_refused_when_built(schedule: NoiseSchedule) -> None:
    for times in (LogitNormal, UniformTimes):
        with pytest.raises(ValueError, match="shift: times can be shifted where the schedule ends in pure noise"):
            objective(schedule, times(shift=2.0))
        objective(schedule, times())
    with pytest.raises(ValueError, match="schedule.shift"):
        pipeline(schedule, Uniform(shift=2.0))
    pipeline(schedule, Uniform())


@pytest.mark.parametrize("ztsnr", [False, True])
@pytest.mark.parametrize("cls", TABLES)
def test_a_shifted_table_is_the_table_at_less_log_snr(cls: type[Table], ztsnr: bool) -> None:
    plain, moved = (cls(zero_terminal_snr=ztsnr, shift=shift) for shift in (1.0, 4.0))  # type: ignore[call-arg]
    level = moved(T)
    torch.testing.assert_close(moved.logsnr(T), plain.logsnr(T) - 2 * math.log(4), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones_like(T))
    torch.testing.assert_close(moved.alpha_bar()[:-1], moved((torch.arange(999, dtype=F64) + 1) / 1000).alpha ** 2)
    torch.testing.assert_close(moved.time(moved.logsnr(T)), T, rtol=1e-9, atol=0)
    above, below = moved(T + 1e-7), moved(T - 1e-7)
    for rate, high, low in zip(moved.rates(T), above, below, strict=True):
        torch.testing.assert_close(rate, (high - low) / 2e-7, rtol=1e-5, atol=1e-5)
    assert (moved(scalar(1.0)).alpha == 0) == moved.pure_noise == ztsnr and moved(scalar(0.0)).sigma == 0


def test_a_shifted_table_is_sampled_like_any_other() -> None:
    schedule = DDPMCosine(shift=4.0)
    start = marginal(schedule, scalar(1.0), 0.5) ** 0.5
    variance = final_variance(Heun(), schedule, Karras()(64, schedule), 0.5, start)
    assert variance == pytest.approx(0.25, rel=0.01)


def test_times_that_no_schedule_has_are_refused_when_built() -> None:
    with pytest.raises(ValueError, match="at most 1000 steps"):
        plan = Sampling(sampler=Heun(), grid=Uniform(), guidance=ClassifierFree(), steps=2000)
        denoiser = Denoiser(lambda x, level, cond: x, Diffusion(schedule=DDPMLinear(), prediction=V()))
        Pipeline(None, denoiser, None, plan, (8, 8))  # type: ignore[arg-type]
    for shift in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="shift must be positive"):
            DDPMLinear(shift=shift)
    assert shifted(T, 1.0, VP()) is T
