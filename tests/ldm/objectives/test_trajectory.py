"""Consistency trajectory models against exact jumps, and the teacher's steps that they learn from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from few_step import Data, Exact, at, drawn, network, nothing, values
from torch import Tensor

from ldm.diffusion import Denoised, Diffusion
from ldm.jumps import mixed, noise_share
from ldm.noise import Noise
from ldm.objectives import Beside
from ldm.objectives.shortcut import TARGET
from ldm.objectives.trajectory import Trajectory, TrajectoryConfig, heun
from ldm.pairing import Independent
from ldm.predictions import EDMF, Velocity
from ldm.schedules import EDM, Flow, NoiseSchedule
from ldm.teacher import Teacher
from ldm.times import UniformTimes
from ldm.weighting import UniformWeight

FLOW, KARRAS = Flow(t_min=0.0), EDM()


def objective(schedule: NoiseSchedule = FLOW, **settings: Any) -> Trajectory:
    made = TrajectoryConfig(**settings).build(
        diffusion=Diffusion(schedule=schedule, prediction=EDMF() if schedule == KARRAS else Velocity()),
        times=UniformTimes(), weighting=UniformWeight(), pairing=Independent())
    assert isinstance(made, Trajectory)
    return made


@pytest.mark.parametrize(("t", "s", "landed", "g", "denoised"), [
    (1, 0.25, 0.5, 0.333333, 0.2), (2, 0.5, 0.342997, 0.123996, 0.058824), (80, 1, 0.0139752, 0.00149382, 3.90610e-5)])
def test_the_table_of_the_paper_s_g(t: float, s: float, landed: float, g: float, denoised: float) -> None:
    """G(x, t, s) = (s / t) x + (1 - s / t) g in sigma, of x = 1: g is the x0 of the jump's pair, and D at s = t."""
    made, data = objective(KARRAS), Data(KARRAS)
    jumping, x = made.student(network(made.config, data, EDMF())), values(1.0)
    pair = jumping.jump(x, at(t / 80), at(s / 80), nothing(1))
    assert pair.x0.item() == pytest.approx(g, rel=4e-6)
    assert mixed(KARRAS, pair, at(s / 80)).item() == pytest.approx(landed, rel=4e-6)
    assert s / t + (1 - s / t) * pair.x0.item() == pytest.approx(landed, rel=4e-6)
    assert jumping(x, at(t / 80), nothing(1)).x0.item() == pytest.approx(denoised, rel=1e-5)


def test_jumps_compose() -> None:
    """G(.5 -> .1) after G(2 -> .5) is G(2 -> .1) = .2473388."""
    made = objective(KARRAS)
    jumping, x = made.student(network(made.config, Data(KARRAS), EDMF())), values(1.0)
    levels = {sigma: at(sigma / 80) for sigma in (2, 0.5, 0.1)}

    def to(x: Tensor, t: float, s: float) -> Tensor:
        return mixed(KARRAS, jumping.jump(x, levels[t], levels[s], nothing(1)), levels[s])

    assert to(x, 2, 0.1).item() == pytest.approx(0.2473388, abs=1e-7)
    assert to(to(x, 2, 0.5), 0.5, 0.1).item() == pytest.approx(to(x, 2, 0.1).item(), abs=1e-12)


def test_the_teacher_s_steps() -> None:
    """Two of DDIM from 1 to .5 end at .5270270. One of Heun from 1 to .75: velocities 1 and .8918919, .7635135."""
    teacher = Teacher(Exact(Data(FLOW)))
    made = objective(solver="ddim", teacher_steps=2)
    assert made.walked(teacher, values(1.0), at(1), at(0.5), nothing(1)).item() == pytest.approx(0.5270270, abs=1e-7)
    one = objective(solver="heun", teacher_steps=1)
    assert one.walked(teacher, values(1.0), at(1), at(0.75), nothing(1)).item() == pytest.approx(0.7635135, abs=1e-7)
    assert made.walked(teacher, values(1.0), at(0.5), at(0.5), nothing(1)).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("schedule", [FLOW, KARRAS], ids=["flow", "edm"])
def test_heun_is_of_second_order_from_pure_noise_too(schedule: NoiseSchedule) -> None:
    """Twice as many steps leave a quarter of the error."""
    data, x, t, u = Data(schedule), values(1.0), at(1), at(0.6)
    teacher, exact = Teacher(Exact(data)), data.moved(values(1.0), at(1), at(0.6))
    errors = [abs(objective(schedule, teacher_steps=steps).walked(teacher, x, t, u, nothing(1)) - exact).item()
              for steps in (16, 32)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)
    torch.testing.assert_close(heun(teacher, x, t, t, nothing(1)), x)


@pytest.mark.parametrize(("steps", "missed"), [(1, 0.0020834), (2, 0.0005087)])
def test_what_an_exact_map_costs_is_what_the_teacher_s_steps_miss(steps: int, missed: float) -> None:
    """From 1 to .75 by Heun and exactly to 0 after it, against exactly: by so much in units of x, from x = 1."""
    made, data = objective(teacher_steps=steps), Data(FLOW)
    net, teacher = network(made.config, data), Teacher(Exact(Data(FLOW)))
    far = made.walked(teacher, values(1.0), at(1), at(0.75), nothing(1))
    end = data.moved(far, at(0.75), at(0)).item()
    assert abs(end - 0.5) == pytest.approx(missed, abs=1e-7)
    draw = drawn(at(1), values(1.0), s=at(0), u=at(0.75))
    loss = made.losses(net, values(0.0), nothing(1), draw, Beside(teacher=teacher, networks={TARGET: net})).total
    assert loss.item() == pytest.approx(missed**2, rel=1e-3)


def test_after_the_teacher_the_average_jumps_on() -> None:
    """From u to s: a wrong average moves the target, and not where u is s."""
    made, data = objective(), Data(FLOW)
    exact, teacher = network(made.config, data), Teacher(Exact(Data(FLOW)))

    def wrong(*asked: Any) -> Tensor:
        return exact(*asked) + 0.1

    def cost(average: Any, s: float) -> float:
        beside = Beside(teacher=teacher, networks={TARGET: average}, bare=exact)
        draw = drawn(at(1), values(1.0), s=at(s), u=at(0.75))
        return made.losses(exact, values(0.0), nothing(1), draw, beside).total.item()

    assert cost(wrong, 0.75) == cost(exact, 0.75) < 1e-3
    # The average's 0.1 counts for three quarters of the way.
    missed = cost(exact, 0) ** 0.5
    assert abs(cost(wrong, 0) ** 0.5 - 0.075) == pytest.approx(missed, rel=1e-3)


@pytest.mark.parametrize(("settings", "weight"), [({}, 1.0), ({"weight": 3.0}, 3.0), ({"denoised": "data"}, 1.0)])
def test_the_denoising_loss(settings: dict[str, Any], weight: float) -> None:
    """At s = t: from the teacher, or from the data, `weight` times."""
    made, data = objective(**settings), Data(FLOW)
    net, teacher = network(made.config, data), Teacher(Exact(data))
    x0, eps, t = values(0.3, -0.7), values(1.2, 0.4), at(0.2, 1.0)

    def shifted(*asked: Any) -> Tensor:
        return net(*asked) + 0.1

    beside = Beside(teacher=teacher, networks={TARGET: lambda *asked: net(*asked) + 5})
    loss = made.losses(shifted, x0, nothing(2), drawn(t, eps, s=t, u=t), beside).total
    now = data.denoised(made.diffusion.perturb(x0, eps, t), t)
    goal = Denoised(x0, eps) if "denoised" in settings else now
    missed = now.eps - now.x0 + 0.1 - goal.eps + goal.x0
    torch.testing.assert_close(loss, weight * missed.float().square()[:, 0])


@pytest.mark.parametrize("schedule", [Flow(), EDM()], ids=["flow", "edm"])
def test_draws(schedule: NoiseSchedule) -> None:
    """s < u <= t, the teacher at most `reach` below t; a quarter denoises, and of the others a quarter lands clean."""
    made, noise, count = objective(schedule), Noise.from_seeds(range(20_000)), 20_000
    draw = made.draw(torch.zeros(count, 1), noise)
    t, s, u = draw.t, draw.more["s"], draw.more["u"]
    still = s == t
    assert still.double().mean().item() == pytest.approx(0.25, abs=0.01) and torch.equal(u[still], t[still])
    t, s, u = t[~still], s[~still], u[~still]
    assert bool((s < t).all() and (s <= u).all() and (u <= t).all() and (u >= schedule.t_min).all())
    assert (s == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    w_t, w_s, w_u = (noise_share(schedule, time) for time in (t, s, u))
    ratio = (w_s / w_t)[s > 0]
    assert ratio.mean().item() == pytest.approx(0.5, abs=0.01) and ratio.max() < 0.9991
    assert ratio.std().item() == pytest.approx(12**-0.5, abs=0.01)
    part = ((w_t - w_u) / (w_t - w_s).clamp(max=0.25))[u > schedule.t_min]
    assert part.max() <= 1 + 1e-9 and part.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (w_t - w_u).max() <= 0.25 + 1e-9


def test_it_needs_a_teacher() -> None:
    made = objective()
    net, draw = network(made.config, Data(FLOW)), drawn(at(1), values(1.0), s=at(0), u=at(0.75))
    with pytest.raises(ValueError, match="objective.kind ctm learns from a trained model: .*--teacher"):
        made.losses(net, values(0.0), nothing(1), draw, Beside(networks={TARGET: net}))


def test_the_average() -> None:
    kept = TrajectoryConfig().companions()[TARGET].kept
    assert kept is not None and kept(0, 10) == kept(9, 10) == 0.999


@pytest.mark.parametrize(("settings", "word"), [
    ({"reach": 0.0}, "reach"), ({"teacher_steps": 0}, "teacher_steps"), ({"solver": "rk4"}, "solver"),
    ({"denoising": 1.0}, "denoising"), ({"clean": 2.0}, "clean"), ({"denoised": "both"}, "denoised")])
def test_settings_that_make_no_sense(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        TrajectoryConfig(**settings)
