from __future__ import annotations

import math

import pytest
import torch
from looping import each

from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.exact import F64
from ldm.grids import (
    GRIDS,
    Entries,
    Exponential,
    Given,
    Grid,
    Karras,
    Leading,
    Linspace,
    Quadratic,
    Ratios,
    Trailing,
    Uniform,
    UniformLogSNR,
)
from ldm.guidance import ClassifierFree
from ldm.pipeline import Pipeline, Sampling
from ldm.predictions import V
from ldm.samplers import Heun, check_grid
from ldm.schedules import EDM, SCHEDULES, VP, DDPMLinear, DDPMScaledLinear, Flow, NoiseSchedule, Table

ENDS: list[NoiseSchedule] = (
    [cls() for cls in SCHEDULES]
    + [Flow(t_min=0.0)]
    + [cls(zero_terminal_snr=True) for cls in SCHEDULES if issubclass(cls, Table)]
)  # type: ignore[call-arg]


def build(cls: type[Grid], steps: int) -> Grid:
    return Given(times=tuple(torch.linspace(1, 0, steps + 1).tolist())) if cls is Given else cls()


@each("schedule", ENDS)
@pytest.mark.parametrize("cls", GRIDS)
def test_every_grid_falls_to_zero_on_every_schedule(cls: type[Grid], schedule: NoiseSchedule) -> None:
    for steps in (1, 2, 3, 10, 50):
        grid = build(cls, steps)(steps, schedule)
        assert len(grid) == steps + 1 and grid.dtype == F64 and bool((check_grid(grid).diff() < 0).all())
        assert grid[-1] == 0 and (grid[0] == 1 or cls is Leading)
        assert bool((grid[:-1] >= schedule.t_min * (1 - 1e-9)).all())
    with pytest.raises(ValueError, match="step"):
        build(cls, 1)(0, schedule)


def test_karras_is_edms_grid() -> None:
    sigmas = Karras()(18, EDM()) * 80
    torch.testing.assert_close(
        sigmas[[0, 1, 2, 3, 16, 17, 18]],
        torch.tensor([80, 57.586, 40.7856, 28.3746, 0.0075, 0.002, 0], dtype=F64),
        atol=5e-5,
        rtol=5e-6,
    )


def test_karras_on_a_table_ends_where_the_table_does() -> None:
    grid = Karras()(10, DDPMScaledLinear())
    assert grid[0] == 1 and grid[-2].item() == pytest.approx(0.001, abs=1e-12)


def test_uniform_quadratic_and_shift() -> None:
    torch.testing.assert_close(Uniform()(4, VP()), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=F64))
    torch.testing.assert_close(Uniform(shift=3)(4, Flow()), torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=F64))
    torch.testing.assert_close(Quadratic()(4, VP()), torch.tensor([1, 0.5625, 0.25, 0.0625, 0], dtype=F64))


def test_log_grids_are_even_in_their_own_variable() -> None:
    for grid in (Exponential(), UniformLogSNR()):
        steps = DDPMScaledLinear().logsnr(grid(12, DDPMScaledLinear())[:-1]).diff()
        torch.testing.assert_close(steps, steps.mean().expand(11))
    sigmas = Exponential(rho=2)(5, EDM())[:-1] * 80
    torch.testing.assert_close(
        (sigmas / 0.002).log() / (80 / 0.002),
        torch.linspace(1, 0, 5, dtype=F64) ** 2 * (torch.tensor(40000.0, dtype=F64).log() / 40000),
    )


def test_table_grids_visit_the_published_entries() -> None:
    def indices(grid: Grid, steps: int) -> list[int]:
        return [round(value) for value in (grid(steps, DDPMLinear())[:-1] * 1000 - 1).tolist()]

    assert indices(Leading(), 10) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert indices(Leading(offset=1), 4) == [751, 501, 251, 1]
    assert indices(Linspace(), 5) == [999, 749, 500, 250, 0]
    assert indices(Trailing(), 4) == [999, 749, 499, 249]
    assert indices(Trailing(), 3) == [999, 666, 332]
    with pytest.raises(ValueError, match="1000"):
        Trailing()(1001, DDPMLinear())
    with pytest.raises(ValueError, match="at most 1000 steps"):
        Uniform()(1001, DDPMLinear())
    assert Quadratic()(1000, DDPMLinear())[-4:].tolist() == [0.003, 0.002, 0.001, 0]


def test_given_times_are_those_where_a_network_may_be_called() -> None:
    for schedule in (VP(), DDPMLinear()):
        with pytest.raises(ValueError, match="at least this schedule's t_min = 0.001"):
            Given(times=(1.0, 0.5, 0.0005, 0.0))(3, schedule)
        assert Given(times=(1.0, 0.5, 0.001, 0.0))(3, schedule)[-2] == 0.001


def refused(grid: Grid, steps: int, schedule: NoiseSchedule) -> str:
    """What a grid says of a schedule and a number of steps that it has no times for; else nothing."""
    try:
        check_grid(grid(steps, schedule))
    except ValueError as refusal:
        return str(refusal)
    return ""


@pytest.mark.parametrize("cls", [cls for cls in GRIDS if issubclass(cls, Ratios) or cls is UniformLogSNR])
def test_a_range_that_a_schedule_does_not_reach_is_refused_with_both(cls: type[Grid]) -> None:
    """Above its noisiest and below its clearest level; one that only meets it is cut."""
    wrong = []
    for schedule in ENDS:
        ends = torch.tensor([max(schedule.t_min, 1e-5), 1], dtype=F64)
        clear, noisy = schedule.logsnr(ends).tolist()
        ranges = [(clear + 0.1, clear + 4, True), (clear - 2, clear + 4, False)]
        if not schedule.pure_noise:
            ranges += [(noisy - 4, noisy - 0.1, True), (noisy - 4, noisy + 2, False)]
        for low, high, outside in ranges:
            if cls is UniformLogSNR:
                grid = UniformLogSNR(logsnr_min=low, logsnr_max=high)
            else:
                grid = cls(sigma_min=math.exp(-high / 2), sigma_max=math.exp(-low / 2))  # type: ignore[call-arg]
            for steps in (1, 2, 5):
                said = refused(grid, steps, schedule)
                asked = f"(log-SNR {low:g} to {high:g}), lies outside the schedule's, "
                own = f"(log-SNR {noisy:g} to {clear:g}); choose one that meets it"
                if said != "" if not outside else not (asked in said and own in said):
                    wrong.append((grid, steps, schedule, said))
    assert not wrong


@pytest.mark.parametrize("cls", [cls for cls in GRIDS if issubclass(cls, Entries)])
def test_more_steps_than_a_table_has_entries_are_refused(cls: type[Grid]) -> None:
    for schedule in (DDPMLinear(), DDPMLinear(steps=12), Flow()):
        total = schedule.steps
        assert refused(cls(), total, schedule) == ""
        assert refused(cls(), total + 1, schedule).endswith(f"1 to {total} steps, got {total + 1}; ask for fewer")


def test_leading_never_visits_an_entry_twice() -> None:
    """At offset 1 the last entry would be past the table where every one is asked for."""
    for schedule in (DDPMLinear(), DDPMLinear(steps=7), VP()):
        total = schedule.steps
        for steps in range(1, total + 1):
            said = refused(Leading(offset=1), steps, schedule)
            expected = f"leading offset 1 leaves a table of {total} entries {total - 1} steps, got {total}"
            assert said.startswith(expected) if steps == total else said == "", (steps, said)


@pytest.mark.parametrize("grid", [Uniform(shift=1e300), Karras(rho=1e-3), Karras(rho=1e300), Exponential(rho=1e6)],
                         ids=repr)
def test_times_that_do_not_fall_are_refused_when_built(grid: Grid) -> None:
    assert f"{grid.kind} has no 5 steps that fall strictly" in refused(grid, 5, Flow())


def test_a_pipeline_is_not_built_on_a_grid_that_its_schedule_cannot_have() -> None:
    denoiser = Denoiser(lambda x, level, cond: x, Diffusion(schedule=DDPMScaledLinear(), prediction=V()))
    for grid, steps in ((Karras(sigma_min=20.0), 25), (Leading(offset=1), 1000), (UniformLogSNR(logsnr_max=-6.0), 25)):
        plan = Sampling(sampler=Heun(), grid=grid, guidance=ClassifierFree(), steps=steps)
        with pytest.raises(ValueError, match="choose one that meets it|ask for fewer"):
            Pipeline(None, denoiser, None, plan, (8, 8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Karras(rho=0),
        lambda: Karras(sigma_min=2, sigma_max=1),
        lambda: Exponential(sigma_min=0),
        lambda: Uniform(shift=0),
        lambda: Uniform(shift=math.inf),
        lambda: Uniform(shift=math.nan),
        lambda: UniformLogSNR(logsnr_min=3, logsnr_max=2),
        lambda: UniformLogSNR(logsnr_max=1401),
        lambda: UniformLogSNR(logsnr_min=-1401),
        lambda: Leading(offset=2),
        lambda: Given(times=(1.0,)),
        lambda: Given(times=(1.0, 0.5)),
        lambda: Given(times=(0.2, 0.5, 0.0)),
        lambda: Given()(3, Flow()),
    ],
)
def test_nonsense_is_refused(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]
