"""Consistency models against exact answers: on Gaussian data every fixed point is a chain of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from few_step import Data, Exact, at, drawn, network, nothing, values
from torch import Tensor

from ldm.diffusion import Denoised, Diffusion
from ldm.exact import F64
from ldm.objectives import ALONE, Beside, Companion
from ldm.objectives.base import ObjectiveConfig
from ldm.objectives.consistency import Consistency, ConsistencyConfig, ConsistencyTrainingConfig
from ldm.objectives.self_consistency import TARGET
from ldm.pairing import Independent
from ldm.predictions import Prediction, V, Velocity
from ldm.schedules import EDM, GVP, VP, DDPMLinear, Flow, NoiseSchedule
from ldm.teacher import Teacher
from ldm.times import Karras, UniformTimes
from ldm.weighting import SNR, UniformWeight, Weighting

Answer = Callable[[Tensor, Tensor, Tensor], Denoised]
DATA = Data(EDM())
CHAINS = {2: 0.0051248, 3: 0.0976578, 5: 0.2336327, 11: 0.3763840, 18: 0.4230382, 40: 0.4648582, 80: 0.4823281,
          150: 0.4905485, 1281: 0.4988854}
HEUN = {18: 0.527633, 40: 0.504885, 80: 0.501153, 150: 0.500316}


def objective(config: ObjectiveConfig, schedule: NoiseSchedule = DATA.schedule, prediction: Prediction | None = None,
              weighting: Weighting | None = None) -> Consistency:
    diffusion = Diffusion(schedule=schedule, prediction=prediction or Velocity())
    built = config.build(diffusion=diffusion, times=UniformTimes(), weighting=weighting or UniformWeight(),
                         pairing=Independent())
    assert isinstance(built, Consistency)
    return built


def training(levels: int, **settings: Any) -> ConsistencyTrainingConfig:
    return ConsistencyTrainingConfig(**{"levels": levels, "doublings": 0, "metric": "l2", "weight": "uniform",
                                        **settings})


def levels(count: int) -> Tensor:
    """Karras et al. 2022, eq. 5, from the clean end."""
    place = torch.arange(count, dtype=F64) / (count - 1)
    r: Tensor = (0.002 ** (1 / 7) + place * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    return r


def euler_chain(r: Tensor, std: float = 0.5) -> Tensor:
    """a_(i + 1) = a_i (s^2 + r_i r_(i + 1)) / (s^2 + r_(i + 1)^2), a_1 = 1: f = a x at each level."""
    return torch.cat([r.new_ones(1), ((std**2 + r[:-1] * r[1:]) / (std**2 + r[1:] ** 2)).cumprod(0)])


def heun_chain(r: Tensor, std: float = 0.5) -> Tensor:
    """Likewise of the mean of both ends' slopes r x / (s^2 + r^2) over a step."""
    slope, h = r / (std**2 + r**2), r[:-1] - r[1:]
    return torch.cat([r.new_ones(1), (1 + h / 2 * (slope[1:] + slope[:-1] * (1 + h * slope[1:]))).cumprod(0)])


def linear(a: Tensor, r: Tensor, alpha: float = 1.0) -> Answer:
    """f = a x at the levels r of EDM's process."""

    def pair(x: Tensor, t: Tensor, _: Tensor) -> Denoised:
        place = (t[:, None] * 80 / r - 1).abs().argmin(1)
        x0 = a[place][:, None] * x
        return Denoised(x0, (x - x0) / (80 * t[:, None]))

    return pair


def corners(t: Tensor, std: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """(t, x0, eps) at each time with x0 = +-std and eps = +-1: means over them have the moments of Gaussian data."""
    x0, eps = at(std, std, -std, -std), at(1, -1, 1, -1)
    return t.repeat_interleave(4), x0.repeat(len(t))[:, None], eps.repeat(len(t))[:, None]


def exact(x: Tensor, t: Tensor, _: Tensor) -> Denoised:
    """The ODE's own f, to t_min."""
    x0 = DATA.moved(x, t, torch.full_like(t, EDM().t_min))
    return Denoised(x0, (x - x0) / (80 * t[:, None]))


def test_the_exact_map() -> None:
    """From sigma 80 to 0.002, as the reading has it."""
    config = ConsistencyConfig()
    ends, _ = objective(config).jump(network(config, DATA, pair=exact), values(80.0), at(1), at(0), nothing(1))
    assert ends.x0.item() == pytest.approx(0.499994235, abs=1e-9)


# The levels


def test_the_curriculum_of_ict() -> None:
    config, steps = ConsistencyTrainingConfig(), 400_000
    assert [config.count(k, steps) for k in range(0, steps, 50_000)] == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert config.count(49_999, steps) == 11 and config.count(steps, steps) == 1281
    assert [config.count(k, 4) for k in range(4)] == [11, 21, 41, 81]
    assert {ConsistencyConfig().count(k, 100) for k in range(100)} == {18}
    assert config.plan(50_000, steps) == "21 levels of noise" and not ConsistencyConfig().plan(1, 2)
    with pytest.raises(ValueError, match="at most 4 doublings of 1, got 5"):
        ConsistencyConfig(doublings=5)


@pytest.mark.parametrize("schedule", [EDM(), Flow(), GVP(), VP(), DDPMLinear(zero_terminal_snr=True)], ids=repr)
def test_a_time_stands_for_the_step_that_it_falls_into(schedule: NoiseSchedule) -> None:
    """The levels are Karras's in sigma / alpha, whose last is t = 1; there weights take sigma_max for its ratio."""
    built = objective(training(6, weight="interval"), schedule, V())
    ends = schedule(at(schedule.t_min, 1))
    low, high = max(0.002, (ends.sigma[0] / ends.alpha[0]).item()), min(80, (ends.sigma[1] / ends.alpha[1]).item())
    r = torch.linspace(low ** (1 / 7), high ** (1 / 7), 6, dtype=F64) ** 7
    t = schedule.time(-2 * (0.5 * (r[1:] + r[:-1])).log())
    now, before, weight = built.interval(t, ALONE)
    assert now[-1] == 1
    torch.testing.assert_close(now[:-1], schedule.time(-2 * r[1:-1].log()), rtol=1e-10, atol=0)
    torch.testing.assert_close(before, schedule.time(-2 * r[:-1].log()), rtol=1e-10, atol=0)
    torch.testing.assert_close(weight, 1 / r.diff(), rtol=1e-10, atol=0)
    assert torch.equal(built.interval(now, ALONE).t, now) and torch.equal(built.interval(at(1), ALONE).t, at(1))
    assert (before >= schedule.t_min).all()


def test_karras_times_take_each_step_equally_often() -> None:
    for schedule in (EDM(), Flow()):
        built = objective(training(10), schedule)
        u = (torch.arange(9000, dtype=F64) + 0.5) / 9000
        t = built.interval(Karras().sample(u, schedule), ALONE).t
        _, counts = torch.unique(t, return_counts=True)
        assert len(counts) == 9 and (counts - 1000).abs().max() <= 1


def test_levels_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="objective.sigma_max 0.004 leaves no levels"):
        objective(training(6, sigma_max=0.004), VP(), V())
    with pytest.raises(ValueError, match="set weighting.kind to uniform instead of snr"):
        objective(training(6), weighting=SNR())
    with pytest.raises(ValueError, match="distill_denoiser --teacher"):
        x = values(1.0)
        objective(ConsistencyConfig(ema=0)).losses(network(ConsistencyConfig(), DATA), x, nothing(1), drawn(at(1), x))


# The fixed points


@pytest.mark.parametrize(("count", "end"), CHAINS.items())
def test_the_fixed_point_of_consistency_training_is_the_euler_chain(count: int, end: float) -> None:
    """f(80) of the chain is the number that is known, and there the mean loss has no slope, at any level."""
    r, config = levels(count), training(count)
    a = euler_chain(r).requires_grad_()
    assert 80 * a[-1].item() == pytest.approx(end, abs=5e-8)
    t, x0, eps = corners(r[1:] / 80)
    loss = objective(config).losses(network(config, DATA, pair=linear(a, r)), x0, nothing(len(t)), drawn(t, eps)).total
    (slope,) = torch.autograd.grad(loss.sum(), a)
    # In units of the curvature 2 E[x^2] = 8 (s^2 + r^2) and of a itself.
    assert (slope / (8 * (0.25 + r**2)) / a.detach()).abs().max() < 1e-6
    off = network(config, DATA, pair=linear(a.detach() * 1.01, r))
    assert objective(config).losses(off, x0, nothing(len(t)), drawn(t, eps)).total.sum() > 0


@pytest.mark.parametrize("count", [2, 3, 5, 11, 18, 40])
def test_what_consistency_training_learns(count: int) -> None:
    """Each level in turn is put where its mean loss is least: that walks up the chain."""
    r, config = levels(count), training(count)
    built, a = objective(config), torch.zeros(count, dtype=F64)
    a[0] = 1
    for i in range(1, count):
        t, x0, eps = corners(r[i : i + 1] / 80)
        slopes = []
        for trial in (0.0, 0.1):
            tried = a.clone()
            tried[i] = trial
            tried.requires_grad_()
            learning = network(config, DATA, pair=linear(tried, r))
            (slope,) = torch.autograd.grad(built.losses(learning, x0, nothing(4), drawn(t, eps)).total.sum(), tried)
            slopes.append(slope[i])
        a[i] = 0.1 * slopes[0] / (slopes[0] - slopes[1])
    assert 80 * a[-1].item() == pytest.approx(CHAINS[count], rel=2e-5)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("count", [18, 40, 80, 150])
def test_the_fixed_point_of_distillation_is_its_solvers_chain(solver: Any, count: int) -> None:
    r, config = levels(count), ConsistencyConfig(levels=count, solver=solver)
    chain = euler_chain(r) if solver == "euler" else heun_chain(r)
    known = CHAINS[count] if solver == "euler" else HEUN[count]
    assert 80 * chain[-1].item() == pytest.approx(known, abs=5e-7)
    t, x0, eps = corners(r[1:] / 80)
    perfect = network(config, DATA, pair=linear(chain, r))
    beside = Beside(networks={TARGET: perfect}, teacher=Teacher(Exact(DATA)))
    losses = objective(config).losses(perfect, x0, nothing(len(t)), drawn(t, eps), beside)
    assert losses.total.max() < 1e-20
    wrong = euler_chain(r) if solver == "heun" else heun_chain(r)
    other = network(config, DATA, pair=linear(wrong, r))
    assert objective(config).losses(other, x0, nothing(len(t)), drawn(t, eps), beside).total.min() > 0


@pytest.mark.parametrize(("count", "euler", "heun"), [
    (18, -0.0077574, 0.0050158), (36, -0.0010353, 0.0002909), (72, -0.0001903, 0.0000247)])
def test_what_the_exact_map_costs(count: int, euler: float, heun: float) -> None:
    """It is no fixed point: on one step in the middle it is off by the solver's error, in units of x."""
    r, teacher = levels(count), Teacher(Exact(DATA))
    t, s = (r[count // 2 - 1 : count // 2] / 80, r[count // 2 - 2 : count // 2 - 1] / 80)
    std = (0.25 + (80 * t) ** 2).sqrt()[:, None]
    for solver, known in (("euler", euler), ("heun", heun)):
        walk = teacher.step if solver == "euler" else teacher.heun
        f_s, f_t = exact(walk(std, t, s, nothing(1)), s, s).x0, exact(std, t, t).x0
        assert (f_s - f_t).item() == pytest.approx(known, abs=6e-8)
        config = ConsistencyConfig(levels=count, solver=solver, ema=0)  # type: ignore[arg-type]
        perfect = network(config, DATA, pair=exact)
        loss = objective(config).losses(perfect, std, nothing(1), drawn(t, 0 * std), Beside(teacher=teacher)).total
        assert loss.sqrt().item() == pytest.approx(abs(known), abs=6e-8)


@pytest.mark.parametrize("config", [ConsistencyConfig(ema=0), training(18), ConsistencyTrainingConfig()], ids=repr)
@pytest.mark.parametrize("schedule", [EDM(), Flow(), VP()], ids=repr)
def test_a_plain_denoiser_costs(config: ObjectiveConfig, schedule: NoiseSchedule) -> None:
    data, x0 = Data(schedule, 0.25, 0.3), values(0.3, -0.2, 0.1)
    plain = network(config, data, pair=lambda x, t, s: data.denoised(x, t))
    draw = drawn(schedule.time(-2 * at(0.3, 0.6, 1).log()), values(1.0, -0.5, 1.2))
    losses = objective(config, schedule).losses(plain, x0, nothing(3), draw, Beside(teacher=Teacher(Exact(data))))
    assert losses.total.min() > 1e-6


def test_the_average_is_what_the_goal_is_of() -> None:
    """With an average the goal is its own, without one the bare network's; of neither is anything learned."""
    x0, eps, a = values(0.3), values(-0.4), torch.tensor(0.7, dtype=F64, requires_grad=True)
    asked: list[str] = []

    def named(name: str, config: ObjectiveConfig) -> Callable[..., Tensor]:
        inner = network(config, DATA, pair=lambda x, t, s: Denoised(a * x, x))

        def call(*given: Any) -> Tensor:
            asked.append(name)
            return inner(*given)

        return call

    for config, other in ((ConsistencyConfig(), TARGET), (ConsistencyConfig(ema=0), "bare")):
        asked.clear()
        beside = Beside(bare=named("bare", config), networks={TARGET: named(TARGET, config)},
                        teacher=Teacher(Exact(DATA)))
        t = levels(18)[9:10] / 80
        built = objective(config)
        loss = built.losses(named("wrapped", config), x0, nothing(1), drawn(t, eps), beside).total
        assert asked == [other, "wrapped"]
        x_t, s = x0 + 80 * t * eps, levels(18)[8:9] / 80
        goal = 0.7 * Teacher(Exact(DATA)).heun(x_t, t, s, nothing(1))
        (slope,) = torch.autograd.grad(loss, a)
        assert slope.item() == pytest.approx((2 * (0.7 * x_t - goal) * x_t).item(), rel=1e-6)
    companion = ConsistencyConfig(ema=0.9).companions()[TARGET]
    assert isinstance(companion, Companion) and companion.kept is not None and companion.kept(3, 10) == 0.9
    assert not ConsistencyTrainingConfig().companions()
