"""Continuous-time consistency against exact answers: TrigFlow's identities, its tangent, and networks' derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from few_step import Data, Exact, at, drawn, network, nothing, values
from test_backbones import SMALL, build, inputs
from torch import Tensor

from ldm.diffusion import Denoised, Diffusion
from ldm.exact import F64
from ldm.objectives import Beside
from ldm.objectives.trig_flow import TrigFlow, TrigFlowConfig, angle
from ldm.pairing import Independent
from ldm.predictions import EDMF, Eps, Prediction, V, Velocity
from ldm.schedules import EDM, GVP, VE, VP, DDPMLinear, Flow, NoiseSchedule
from ldm.teacher import Teacher
from ldm.times import UniformTimes
from ldm.uncertainty import Weighed
from ldm.weighting import EDMWeight, Learned, UniformWeight, Weighting

SCHEDULES = [EDM(), Flow(), GVP(), VP(), VE(), DDPMLinear()]
Pair = Callable[[Tensor, Tensor, Tensor], Denoised]


def objective(config: TrigFlowConfig, schedule: NoiseSchedule, prediction: Prediction | None = None,
              weighting: Weighting | None = None) -> TrigFlow:
    diffusion = Diffusion(schedule=schedule, prediction=prediction or V())
    built = config.build(diffusion=diffusion, times=UniformTimes(), weighting=weighting or EDMWeight(),
                         pairing=Independent())
    assert isinstance(built, TrigFlow)
    return built


def exactly(data: Data) -> Pair:
    """The exact map to the clean end, by a formula that has derivatives in t."""

    def pair(x: Tensor, t: Tensor, _: Tensor) -> Denoised:
        alpha, sigma = (part[:, None] for part in data.schedule(t))
        x0 = data.mean + data.std * (x - alpha * data.mean) / ((alpha * data.std) ** 2 + sigma**2).sqrt()
        return Denoised(x0, (x - alpha * x0) / sigma)

    return pair


def place(schedule: NoiseSchedule, *phi: float, sigma_data: float = 0.5) -> Tensor:
    """The times of angles."""
    return schedule.time(-2 * (sigma_data * at(*phi).tan()).log())


@pytest.mark.parametrize("schedule", [*SCHEDULES, DDPMLinear(zero_terminal_snr=True)], ids=repr)
def test_the_angle(schedule: NoiseSchedule) -> None:
    """x = cos phi x0 + sin phi sigma_data eps, from t_min to the end; and its pace is the inverse of its slope."""
    t = torch.linspace(schedule.t_min, 1, 20, dtype=F64)
    alpha, sigma = schedule(t)
    found = angle(schedule, t, 0.5)
    torch.testing.assert_close(found.scale * alpha, found.cos, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.scale * sigma, 0.5 * found.sin, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.cos**2 + found.sin**2, torch.ones_like(t), rtol=1e-12, atol=0)
    assert all(part.isfinite().all() for part in found)
    inside = t[1:-1] + 1e-4  # not at an entry of a table, where its slope has a step
    level = schedule(inside)
    inside.requires_grad_()
    phi = torch.atan2(schedule(inside).sigma, 0.5 * schedule(inside).alpha)
    (slope,) = torch.autograd.grad(phi.sum(), inside)
    torch.testing.assert_close(angle(schedule, inside.detach(), 0.5).pace, 1 / slope, rtol=1e-9, atol=0)
    assert level.alpha.isfinite().all()


@pytest.mark.parametrize("schedule", [EDM(), Flow(), VP()], ids=repr)
@pytest.mark.parametrize(("std", "f", "of_f", "of_v"), [(1.0, 1.460290, -2.186617, -1.454271),
                                                        (0.5, 1.0, -2 * math.tan(0.5), None)])
def test_the_identities(schedule: NoiseSchedule, std: float, f: float, of_f: float, of_v: float | None) -> None:
    """At phi = 1, in units of x: the exact map f, its F, and that of the velocity. Where the data have the deviation
    sigma_data, f is x and F = -tan(phi / 2) x / sigma_data."""
    data, t = Data(schedule, std), place(schedule, 1.0)
    built = objective(TrigFlowConfig(), schedule)
    x_t = (1 / angle(schedule, t, 0.5).scale)[:, None]  # x is 1
    ends = data.jump(x_t, t, torch.zeros_like(t))
    assert ends.x0.item() == pytest.approx(f, abs=2e-6)
    assert built.trig(ends, t).item() == pytest.approx(of_f, abs=2e-6)
    if of_v is not None:
        assert built.trig(data.denoised(x_t, t), t).item() == pytest.approx(of_v, abs=2e-6)
    assert math.cos(1) - math.sin(1) * 0.5 * built.trig(ends, t).item() == pytest.approx(f, abs=2e-6)


@pytest.mark.parametrize("derivative", ["jvp", "finite-difference"])
@pytest.mark.parametrize("prediction", [V(), EDMF(sigma_data=0.7), Velocity()], ids=repr)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_exact_map_has_no_tangent(schedule: NoiseSchedule, prediction: Prediction, derivative: Any) -> None:
    """Along the exact ODE f stays what it is, so that g is 0, and the loss; a plain denoiser's is not."""
    config, data = TrigFlowConfig(derivative=derivative, warmup=0, h=1e-5), Data(schedule, 0.5, 0.3)
    x0, eps, t = values(0.3, -0.2, 0.8), values(0.7, -1.1, 0.4), place(schedule, 0.3, 0.9, 1.4)
    built = objective(config, schedule, prediction)
    exact = network(config, data, prediction, pair=exactly(data))
    plain = network(config, data, prediction, pair=lambda x, t, s: data.denoised(x, t))
    beside = Beside(teacher=Teacher(Exact(data)))
    x_t = built.diffusion.perturb(x0, eps, t)
    for answer, low, high in ((exact, 0.0, 1e-9 if derivative == "jvp" else 1e-5), (plain, 1e-2, 1e2)):
        ends, _ = built.jump(answer, x_t, t, t, nothing(3))
        g = built.tangent(answer, x_t, data.denoised(x_t, t), t, nothing(3), ends, 1.0).abs()
        assert (g >= low).all() and (g < high).all()
        loss = built.losses(answer, x0, nothing(3), drawn(t, eps), beside).total.double()
        torch.testing.assert_close(loss, (g / (g + 0.1)).square()[:, 0], rtol=1e-5, atol=1e-8)


def test_the_tangent_by_hand() -> None:
    """F = (1 + phi) x: g is what algorithm 1 says, at each r, of the way of sample and noise."""
    schedule, phi, data = EDM(), 0.8, Data(EDM())
    t, sd, x0, eps = place(EDM(), phi), 0.5, 0.4, -0.6

    def pair(x: Tensor, t: Tensor, _: Tensor) -> Denoised:
        """cos phi x - sin phi sigma_data F, and the eps to it."""
        where = angle(schedule, t, sd)
        y = where.scale[:, None] * x
        f = (1 + torch.atan2(where.sin, where.cos))[:, None] * y
        clean = where.cos[:, None] * y - where.sin[:, None] * sd * f
        return Denoised(clean, (x - clean) / (80 * t[:, None]))

    x, dx = math.cos(phi) * x0 + math.sin(phi) * sd * eps, math.cos(phi) * sd * eps - math.sin(phi) * x0
    for derivative, near in (("jvp", 1e-12), ("finite-difference", 1e-8)):
        config = TrigFlowConfig(derivative=derivative)  # type: ignore[arg-type]
        built, answer = objective(config, schedule), network(config, data, V(), pair=pair)
        x_t = values(x0) + 80 * t[:, None] * values(eps)
        ends, _ = built.jump(answer, x_t, t, t, nothing(1))
        for r in (0.0, 0.3, 1.0):
            slope = (1 + phi) * dx + x
            wanted = (-math.cos(phi) ** 2 * (sd * (1 + phi) * x - dx)
                      - r * math.cos(phi) * math.sin(phi) * (x + sd * slope))
            way = Denoised(values(x0), values(eps))
            got = built.tangent(answer, x_t, way, t, nothing(1), ends, r)
            assert got.item() == pytest.approx(wanted, abs=near)


def test_from_data_the_tangent_vanishes_in_the_mean() -> None:
    """At the exact map, over samples and noise that make up the same x_t: the way's mean is the ODE's."""
    config, data, t = TrigFlowConfig(), Data(Flow()), at(0.6)
    built, answer = objective(config, Flow()), network(config, data, V(), pair=exactly(data))
    x_t = values(0.7)
    mean = data.denoised(x_t, t)
    off = values(0.9)  # to either side of the mean x0, with the eps that goes with it
    ways = [Denoised(mean.x0 + sign * off, mean.eps - sign * 0.4 / 0.6 * off) for sign in (1, -1)]
    ends, _ = built.jump(answer, x_t, t, t, nothing(1))
    g = [built.tangent(answer, x_t, way, t, nothing(1), ends, 1.0).item() for way in ways]
    assert abs(g[0]) > 0.1 and g[0] + g[1] == pytest.approx(0, abs=1e-10)


def test_the_warm_up() -> None:
    config = TrigFlowConfig()
    assert [config.rise(step, 100) for step in (0, 5, 10, 11, 99)] == [0, 0.5, 1, 1, 1]
    assert config.plan(9, 100) == "the warm-up of the tangent" and config.plan(10, 100) == "the whole tangent"
    assert TrigFlowConfig(warmup=0).rise(0, 100) == TrigFlowConfig(warmup=0).rise(0, 1) == 1
    # At r = 0 the tangent is F's distance from the teacher's velocity: its own denoiser costs nothing.
    data, x0, eps, t = Data(Flow()), values(0.3), values(-0.7), at(0.6)
    plain, built = network(config, data, V(), pair=lambda x, t, s: data.denoised(x, t)), objective(config, Flow())
    teacher = Teacher(Exact(data))
    costs = [built.losses(plain, x0, nothing(1), drawn(t, eps), Beside(step, 100, teacher=teacher)).total.item()
             for step in (0, 1, 5, 10, 99)]
    assert costs[0] < 1e-20 < costs[1] < costs[2] < costs[3] == costs[4]


@pytest.mark.parametrize("prediction", [V(), Velocity(), EDMF()], ids=repr)
def test_the_loss_is_that_of_f_whatever_is_predicted(prediction: Prediction) -> None:
    """With the weighting `edm` the mean of (g / (||g|| + c))^2, whose slope in F is -2 / d of that; and it is weighed
    by what the network expects of it."""
    config, schedule = TrigFlowConfig(warmup=0, c=0.2), Flow()
    data, built = Data(schedule, 0.25, 0.3), objective(config, schedule, prediction)
    moved = torch.zeros((), dtype=F64, requires_grad=True)
    t, x0 = at(0.4, 0.8), torch.tensor([[0.3, -0.5, 0.2], [0.1, 0.6, -0.9]], dtype=F64)
    eps = torch.tensor([[1.0, 0.2, -0.7], [-0.3, 0.5, 1.4]], dtype=F64)

    def pair(x: Tensor, t: Tensor, _: Tensor) -> Denoised:
        """The denoiser, its F moved by a number."""
        where, ends = angle(schedule, t, 0.5), data.denoised(x, t)
        return Denoised(ends.x0 - (0.5 * where.sin)[:, None] * moved, ends.eps + where.cos[:, None] * moved)

    answer = network(config, data, prediction, pair=pair)
    loss = built.losses(answer, x0, nothing(2), drawn(t, eps)).total
    x_t = built.diffusion.perturb(x0, eps, t)
    ends, _ = built.jump(answer, x_t, t, t, nothing(2))
    g = built.tangent(answer, x_t, Denoised(x0, eps), t, nothing(2), ends.__class__(*(e.detach() for e in ends[:2])), 1)
    step = g / (g.square().sum(1, keepdim=True).sqrt() + 0.2)
    torch.testing.assert_close(loss.detach().double(), step.square().mean(1), rtol=1e-5, atol=0)
    (slope,) = torch.autograd.grad(loss.sum(), moved)
    assert slope.item() == pytest.approx(-2 * step.mean(1).sum().item(), rel=1e-5)

    def expecting(x: Tensor, level: Tensor, cond: Any) -> Weighed:
        return Weighed(answer(x, level, cond), torch.tensor([0.5, -1.0]))

    learned = objective(config, schedule, prediction, Learned())
    weighed = learned.losses(expecting, x0, nothing(2), drawn(t, eps)).total
    factor, u = torch.tensor([-0.5, 1.0]).exp(), torch.tensor([0.5, -1.0])
    torch.testing.assert_close(weighed, factor * loss + u, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", [
    Flow(), Flow(t_min=0.0), GVP(), VP(), EDM(), VE(), DDPMLinear(), DDPMLinear(zero_terminal_snr=True)], ids=repr)
@pytest.mark.parametrize("derivative", ["jvp", "finite-difference"])
def test_the_ends_are_finite(schedule: NoiseSchedule, derivative: Any) -> None:
    """From the first time at which a network is called to t = 1, where of pure noise nothing is learned."""
    t = schedule.trained(torch.tensor([0.0, 1e-6, 0.5, 1.0], dtype=F64))
    x0, eps = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    backbone, cond = build(SMALL["unet"]).float(), inputs()[2].select(torch.tensor([0, 1, 2, 0])).to("cpu", x0.dtype)
    config = TrigFlowConfig(derivative=derivative, warmup=0)
    losses = objective(config, schedule).losses(backbone, x0, cond, drawn(t, eps))
    assert losses.total.isfinite().all() and losses.total[:-1].min() > 0
    assert (losses.total[-1] > 1e-6) == (not schedule.pure_noise)  # there cos phi is 0, and so is the tangent
    torch.autograd.backward(losses.total.sum())
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())


@pytest.mark.parametrize("schedule", [Flow(), EDM(), VP(), DDPMLinear(zero_terminal_snr=True)], ids=repr)
@pytest.mark.parametrize("name", ["unet-linear", "dit-modern"])
def test_jvp_is_the_difference(name: str, schedule: NoiseSchedule) -> None:
    """Of dF / d phi, near both ends of time too: by the default step in float32 to two per cent, most of it at t = 1,
    where steps are taken to one side. A step that is not scaled to the process is off by more than ten, somewhere."""
    backbone, (x0, _, cond) = build(SMALL[name]), inputs()
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    t = schedule.trained(at(0.01, 0.5, 1.0))
    slopes = []
    for dtype, derivative in ((F64, "jvp"), (torch.float32, "jvp"), (torch.float32, "finite-difference")):
        built = objective(TrigFlowConfig(derivative=derivative), schedule)  # type: ignore[arg-type]
        way = Denoised(x0.to(dtype), eps.to(dtype))
        x_t = built.diffusion.perturb(*way[:2], t)
        slopes.append(built.slope(backbone.to(dtype), x_t, way, t, cond.to("cpu", dtype)).double())
    exact, size = slopes[0], slopes[0].flatten(1).norm(dim=1)
    for other, near in zip(slopes[1:], (2e-3, 2e-2), strict=True):
        assert ((other - exact).flatten(1).norm(dim=1) < near * size).all()


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("derivative", ["jvp", "finite-difference"])
def test_gradient_checkpointing_changes_nothing(kind: str, derivative: Any) -> None:
    """The learning forward recomputes; the derivative, without gradients, does not meet it. Same loss, same slopes."""
    x0, _, cond = inputs()
    eps, t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2), dtype=F64), at(0.05, 0.5, 1.0)
    found = []
    for saving in (False, True):
        backbone = build(replace(SMALL[kind], gradient_checkpointing=saving))
        built = objective(TrigFlowConfig(derivative=derivative, warmup=0), Flow())
        loss = built.losses(backbone, x0, cond, drawn(t, eps), Beside(bare=backbone)).total
        torch.autograd.backward(loss.sum())
        slopes = [p.grad for p in backbone.parameters() if p.grad is not None]
        found.append([loss.detach(), *slopes])
    assert len(found[0]) > 10
    for plain, saved in zip(*found, strict=True):
        torch.testing.assert_close(plain, saved, rtol=1e-9, atol=1e-12)


def test_one_forward_learns_and_the_bare_network_is_derived() -> None:
    config, data = TrigFlowConfig(warmup=0), Data(Flow())
    inner, asked = network(config, data, V()), []

    def named(name: str) -> Callable[..., Tensor]:
        def call(*given: Any) -> Tensor:
            asked.append((name, torch.is_grad_enabled()))
            return inner(*given)

        return call

    beside = Beside(bare=named("bare"))
    objective(config, Flow()).losses(named("wrapped"), values(0.3), nothing(1), drawn(at(0.5), values(0.1)), beside)
    assert asked[0] == ("wrapped", True) and {name for name, _ in asked[1:]} == {"bare"}


def test_settings() -> None:
    with pytest.raises(ValueError, match="scm derivative must be one of jvp, finite-difference"):
        TrigFlowConfig(derivative="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scm h must be in"):
        TrigFlowConfig(h=0.1)
    with pytest.raises(ValueError, match="cannot tell x0"):
        objective(TrigFlowConfig(), Flow(), Eps())
    objective(TrigFlowConfig(), VP(), Eps(), UniformWeight())
