"""Easy consistency tuning against exact answers: its times, what it is at each stage, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from few_step import Data, Exact, at, drawn, network, nothing, values
from torch import Tensor

from ldm.diffusion import Denoised, Diffusion
from ldm.objectives import ALONE, Beside
from ldm.objectives.easy_consistency import EasyConsistency, EasyConsistencyConfig
from ldm.pairing import Independent
from ldm.predictions import V, Velocity
from ldm.schedules import EDM, GVP, VP, DDPMLinear, Flow, NoiseSchedule
from ldm.teacher import Teacher
from ldm.times import UniformTimes
from ldm.weighting import EDMWeight, UniformWeight, Weighting

SCHEDULES = [EDM(), Flow(), GVP(), VP(), DDPMLinear(), DDPMLinear(zero_terminal_snr=True)]


def objective(config: EasyConsistencyConfig, schedule: NoiseSchedule, weighting: Weighting | None = None,
              ) -> EasyConsistency:
    diffusion = Diffusion(schedule=schedule, prediction=V())
    built = config.build(diffusion=diffusion, times=UniformTimes(), weighting=weighting or UniformWeight(),
                         pairing=Independent())
    assert isinstance(built, EasyConsistency)
    return built


def in_stage(n: int) -> Beside:
    return Beside(step=n, steps=8)


@pytest.mark.parametrize(("q", "r", "n", "earlier"), [
    (2, 1, 0, 0), (2, 1, 1, 0.212117), (2, 1, 2, 0.606059), (2, 1, 3, 0.803029), (2, 1, 7, 0.987689),
    (2, 5, 0, 2.366143), (2, 5, 1, 3.683071), (4, 1, 0, 0.212117), (4, 1, 1, 0.803029), (4, 1, 2, 0.950757)])
def test_the_earlier_ratio(q: float, r: float, n: int, earlier: float) -> None:
    config = EasyConsistencyConfig(q=q)
    assert config.earlier(at(r), n).item() == pytest.approx(earlier, abs=6e-7)
    t, s, weight = objective(config, EDM()).interval(at(r / 80), in_stage(n))
    assert t.item() == r / 80 and 80 * s.item() == pytest.approx(earlier, abs=6e-7)
    assert weight.item() == pytest.approx(1 / (r - earlier), rel=1e-4)


def test_the_stages_are_equal_shares() -> None:
    config = EasyConsistencyConfig()
    assert [config.stage(step, 16) for step in range(16)] == [n for n in range(8) for _ in range(2)]
    assert EasyConsistencyConfig(stages=1).stage(9, 10) == 0
    assert config.stage(99, 16) == 7 and config.plan(5, 16) == "stage 2 of how near both times are"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_times_are_those_of_the_ratio_on_every_schedule(schedule: NoiseSchedule) -> None:
    """Finite and below t throughout, also at pure noise, which stands for sigma_max; 0 below t_min's ratio."""
    t = schedule.trained(torch.linspace(0, 1, 41, dtype=torch.float64))
    level = schedule(t)
    ratios = (level.sigma / level.alpha).clamp(max=80)
    for n in (0, 2, 7):
        found, s, weight = objective(EasyConsistencyConfig(), schedule).interval(t, in_stage(n))
        assert torch.equal(found, t) and (s < t).all() and weight.isfinite().all() and (weight > 0).all()
        wanted = [r * max(0.0, 1 - (1 + 8 / (1 + math.exp(r))) / 2 ** (n + 1)) for r in ratios.tolist()]
        before = schedule(s)
        for got, r in zip((before.sigma / before.alpha).tolist(), wanted, strict=True):
            assert got == pytest.approx(r, rel=1e-6) if got else r <= ratios[0].item() * (1 + 1e-12)
        torch.testing.assert_close(weight, 1 / (ratios - at(*wanted)), rtol=1e-9, atol=0)


def test_the_first_stage_denoises() -> None:
    """Where the earlier time is the clean end, f is held to the data, whatever the network says there."""
    config, schedule = EasyConsistencyConfig(huber=0.1), EDM()
    data, x0, eps = Data(schedule), values(0.3, -0.6), values(1.0, 0.4)
    plain = network(config, data, V(), pair=lambda x, t, s: data.denoised(x, t))
    t = at(0.5, 1) / 80
    loss = objective(config, schedule).losses(plain, x0, nothing(2), drawn(t, eps)).total
    error = 0.25 / (0.25 + (80 * t[:, None]) ** 2) * (x0 + 80 * t[:, None] * eps) - x0
    wanted = ((error**2 + 0.01).sqrt() - 0.1)[:, 0] / (80 * t)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("schedule", [EDM(), Flow(), VP()], ids=repr)
def test_what_the_exact_map_costs(schedule: NoiseSchedule, taught: bool) -> None:
    """How far the step from t to the earlier time leaves the ODE's way, and nothing else; by a teacher that vanishes
    with the square of the step. A plain denoiser costs more."""
    config, data = EasyConsistencyConfig(huber=1e-12, stages=10), Data(schedule, 0.25, 0.3)
    x0, eps, t = values(0.3, -0.2), values(0.7, -1.1), schedule.time(-2 * at(0.4, 2).log())
    x_t = Diffusion(schedule=schedule, prediction=Velocity()).perturb(x0, eps, t)
    steps, clean = [], torch.zeros_like(t)
    for n in (5, 7, 9):
        beside = Beside(step=n, steps=10, teacher=Teacher(Exact(data)) if taught else None)
        _, s, weight = objective(config, schedule).interval(t, beside)
        alpha, sigma = (part[:, None] for part in schedule(s))
        ends = data.denoised(x_t, t) if taught else Denoised(x0, eps)
        x_s = alpha * ends.x0 + sigma * ends.eps
        wanted = (data.moved(x_s, s, clean) - data.moved(x_t, t, clean)).abs()[:, 0] * weight
        exact = network(config, data, V())
        loss = objective(config, schedule).losses(exact, x0, nothing(2), drawn(t, eps), beside).total.double()
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-9)
        plain = network(config, data, V(), pair=lambda x, t, s: data.denoised(x, t))
        dear = objective(config, schedule).losses(plain, x0, nothing(2), drawn(t, eps), beside).total
        assert not taught or (dear > 2 * loss).all()
        steps.append(wanted)
    if taught:
        assert (steps[1] / steps[2]).mean().item() == pytest.approx(4, rel=0.1)


def test_f_is_x_at_the_clean_end_to_the_last_bit() -> None:
    x, y = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    diffusion = Diffusion(schedule=Flow(t_min=0.0), prediction=Velocity())
    config = EasyConsistencyConfig()
    assert torch.equal(config.reading(diffusion, x, y, torch.zeros(3, dtype=torch.float64)).x0, x)


def test_nothing_is_learned_of_the_earlier_time() -> None:
    config, schedule, a = EasyConsistencyConfig(huber=10.0), EDM(), torch.tensor(0.6, dtype=torch.float64)
    a.requires_grad_()

    def pair(x: Tensor, t: Tensor, _: Tensor) -> Denoised:
        return Denoised(a * x, (x - a * x) / (80 * t[:, None]))

    t, x0, eps = at(5) / 80, values(0.3), values(-0.8)
    learning = network(config, Data(schedule), V(), pair=pair)
    loss = objective(config, schedule).losses(learning, x0, nothing(1), drawn(t, eps), in_stage(1)).total
    (slope,) = torch.autograd.grad(loss, a)
    x_t, x_s = (0.3 - 0.8 * r for r in (5, 3.683071))
    off = 0.6 * (x_t - x_s)
    assert slope.item() == pytest.approx(off * x_t / (off**2 + 100) ** 0.5 / (5 - 3.683071), rel=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="set weighting.kind to uniform instead of edm"):
        objective(EasyConsistencyConfig(), EDM(), EDMWeight())
    with pytest.raises(ValueError, match="ect q must be in"):
        EasyConsistencyConfig(q=1)
    assert objective(EasyConsistencyConfig(), EDM()).interval(at(1), ALONE).t == 1
