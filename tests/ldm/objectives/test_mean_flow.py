"""MeanFlow against exact average velocities, and what its draws and its weight are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from few_step import Data, Exact, at, drawn, network, nothing, values
from torch import Tensor

from ldm.diffusion import Denoised, Diffusion
from ldm.exact import F64
from ldm.jumps import SPAN
from ldm.noise import Noise
from ldm.objectives import Beside
from ldm.objectives.derivative import along
from ldm.objectives.mean_flow import MeanFlow, MeanFlowConfig
from ldm.pairing import Independent
from ldm.predictions import EDMF, Velocity
from ldm.schedules import EDM, Flow, NoiseSchedule
from ldm.teacher import Teacher
from ldm.times import LogitNormal, LossAware, Places, TimeSampling, UniformTimes
from ldm.uncertainty import Weighed
from ldm.weighting import UniformWeight

FLOW = Flow(t_min=0.0)
EXACT, DIFFERENCE = MeanFlowConfig(), MeanFlowConfig(derivative="finite-difference", step=1e-4)
WIDE = Data(FLOW, 0.5, 0.3)  # N(.3, .25)


def objective(config: MeanFlowConfig = EXACT, schedule: NoiseSchedule = FLOW,
              times: TimeSampling | None = None) -> MeanFlow:
    diffusion = Diffusion(schedule=schedule, prediction=EDMF() if isinstance(schedule, EDM) else Velocity())
    made = config.build(diffusion=diffusion, times=times or UniformTimes(), weighting=UniformWeight(),
                        pairing=Independent())
    assert isinstance(made, MeanFlow)
    return made


def velocity(pair: Denoised) -> float:
    return (pair.eps - pair.x0).item()


NUMBERS = [(Data(FLOW), 1, 0, 1, 0.5), (Data(FLOW), 1, 0, 0.5, 0.2111456), (Data(FLOW), 1, 0.25, 0.75, 0.8145020),
           (Data(FLOW), 2, 0.5, 1, 1.7639320), (WIDE, 1, 0, 1, 0.2), (WIDE, 1, 0.25, 0.75, 0.4534144),
           (Data(FLOW), 1, 0, 0.6, 0.3490510)]


@pytest.mark.parametrize("config", [EXACT, DIFFERENCE], ids=["jvp", "finite-difference"])
@pytest.mark.parametrize(("data", "x", "s", "t", "u"), NUMBERS)
def test_the_target_of_an_exact_network(config: MeanFlowConfig, data: Data, x: float, s: float, t: float,
                                        u: float) -> None:
    """Its own average velocity, from the instantaneous one and its own derivative."""
    x_t, now = values(x), data.denoised(values(x), at(t))
    assert velocity(data.jump(x_t, at(t), at(s))) == pytest.approx(u, abs=1e-7)
    goal = objective(config).goal(network(config, data), x_t, at(t), at(s), now, nothing(1))
    assert velocity(goal) == pytest.approx(u, abs=1e-7)
    torch.testing.assert_close((1 - t) * goal.x0 + t * goal.eps, x_t)


@pytest.mark.parametrize(("s", "t", "v", "slope"), [(0.25, 0.75, 1.1891892, 0.7493743), (0, 0.6, 1.25, 1.5015817)])
def test_the_identity_of_both_velocities(s: float, t: float, v: float, slope: float) -> None:
    """u + (t - s) du/dt = v, with du/dt along v."""
    data, x = Data(FLOW), values(1.0)

    def average(x: Tensor, t: Tensor) -> Tensor:
        pair = data.jump(x, t, at(s))
        return pair.eps - pair.x0

    instant = data.denoised(x, at(t))
    u, derivative = along(average, x, at(t), instant.eps - instant.x0, "jvp", 0)
    assert velocity(instant) == pytest.approx(v, abs=1e-7) and derivative.item() == pytest.approx(slope, abs=1e-7)
    assert (u + (t - s) * derivative).item() == pytest.approx(velocity(instant), abs=1e-9)


def test_without_a_span_the_target_is_the_velocity() -> None:
    """Of the data and its noise, bit for bit, whatever the network is; of the teacher where there is one."""
    data, x0, eps, t = Data(FLOW), values(0.3, -0.7), values(1.2, 0.4), at(0.2, 1.0)
    made = objective(MeanFlowConfig(power=0.0))
    exact, draw, x_t = network(EXACT, data), drawn(t, eps, s=t), made.diffusion.perturb(x0, eps, t)

    def odd(*asked: Any) -> Tensor:
        return 0.5 * exact(*asked) + 0.1

    answer = odd(x_t, 1000 * t, nothing(2)._replace(extras={SPAN: t * 0}))
    assert torch.equal(made.losses(odd, x0, nothing(2), draw).total, (answer - (eps - x0)).float().square()[:, 0])
    v = data.denoised(x_t, t)
    taught = made.losses(odd, x0, nothing(2), draw, Beside(teacher=Teacher(Exact(data)))).total
    torch.testing.assert_close(taught, (answer - (v.eps - v.x0)).float().square()[:, 0])


def test_the_target_is_held_constant_and_divided_by_what_it_misses() -> None:
    """The loss is e / (e + c)^p and its gradient that of e over the constant (e + c)^p."""
    data, x0, draw = Data(FLOW), values(0.3), drawn(at(0.75), values(-0.4), s=at(0.25))
    shift = torch.tensor(0.3, dtype=F64, requires_grad=True)
    exact = network(EXACT, data)
    results = []
    for power, offset in ((0.0, 1.0), (1.0, 1e-2), (0.5, 1e-3)):
        made = objective(MeanFlowConfig(power=power, offset=offset))
        loss = made.losses(lambda *asked: exact(*asked) + shift, x0, nothing(1), draw, Beside(bare=exact)).total
        results.append((loss, torch.autograd.grad(loss.sum(), shift)[0]))
    (error, slope), first, second = results
    for (loss, gradient), power, offset in ((first, 1, 1e-2), (second, 0.5, 1e-3)):
        torch.testing.assert_close(loss, error / (error + offset) ** power)
        torch.testing.assert_close(gradient, slope / (error.item() + offset) ** power, rtol=1e-6, atol=0)
    x_t = made.diffusion.perturb(x0, draw.eps, draw.t)
    goal = made.goal(exact, x_t, draw.t, draw.more["s"], Denoised(x0, draw.eps), nothing(1))
    missed = velocity(data.jump(x_t, draw.t, draw.more["s"])) + 0.3 - velocity(goal)
    assert error.item() == pytest.approx(missed**2, rel=1e-5) and slope.item() == pytest.approx(2 * missed, rel=1e-5)


def test_the_mean_target_of_data_is_that_of_the_velocity() -> None:
    """The target is a line in the noise and data of one x_t, so that the expectation given x_t is the teacher's."""
    made, x, t, s = objective(), values(1.0), at(0.75), at(0.25)
    net = network(EXACT, Data(FLOW))

    def goal(now: Denoised) -> Tensor:
        return made.goal(net, x, t, s, now, nothing(1)).eps

    one, other = (Denoised(x0, (x - 0.25 * x0) / 0.75) for x0 in (values(0.5), values(-0.9)))
    middle = Denoised((one.x0 + other.x0) / 2, (one.eps + other.eps) / 2)
    torch.testing.assert_close((goal(one) + goal(other)) / 2, goal(middle))


def test_draws() -> None:
    """Two times of one distribution, the first stratified; a quarter of the samples have both."""
    made, noise = objective(times=LogitNormal(mean=-0.4, stratified=True)), Noise.from_seeds(range(4000))
    places = Places(torch.arange(4000), 4000)
    draw = made.draw(torch.zeros(4000, 1), noise, places)
    first = made.times.draw(places.stratify(noise.uniform((), "time")), FLOW)[0]
    second = made.times.draw(noise.uniform((), "r"), FLOW)[0]
    apart = noise.uniform((), "apart") < 0.25
    assert torch.equal(draw.t, torch.where(apart, torch.maximum(first, second), first))
    assert torch.equal(draw.more["s"], torch.where(apart, torch.minimum(first, second), first))
    assert (draw.more["s"] < draw.t).double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(draw.factor, torch.ones(4000, dtype=F64))


def test_loss_aware_draws_undo_the_choice_of_both_times() -> None:
    """The mean of the factors over pairs is 1, and that of any function of both times what it is of uniform ones."""
    times, count = LossAware(bins=2), 40_000
    seen, made = torch.tensor([9.0, 1.0], dtype=F64), objective(MeanFlowConfig(apart=1.0), times=LossAware(bins=2))
    draw = made.draw(torch.zeros(count, 1), Noise.from_seeds(range(count)), seen=seen)
    low = times.draw(at(0.1), FLOW, seen)[1].item()
    high = times.draw(at(0.99), FLOW, seen)[1].item()
    both = {round(low * low, 9), round(low * high, 9), round(high * high, 9)}
    assert {round(value, 9) for value in draw.factor.tolist()} == both
    assert draw.factor.mean().item() == pytest.approx(1, abs=0.02)
    product = (draw.factor * draw.t * draw.more["s"]).mean()
    assert product.item() == pytest.approx(0.25, abs=0.01)


def test_a_learned_weight_is_read_with_the_prediction() -> None:
    data, x0, draw = Data(FLOW), values(0.3), drawn(at(0.75), values(-0.4), s=at(0.25))
    exact, u = network(EXACT, data), torch.tensor([0.7])
    made = objective()
    weighed = made.losses(lambda *asked: Weighed(exact(*asked), u), x0, nothing(1), draw).total
    plain = made.losses(exact, x0, nothing(1), draw).total
    torch.testing.assert_close(weighed, plain * (-u).exp() + u)


def test_single_precision_is_enough() -> None:
    """The residual of an exact map in float32 is that of rounding, on `edm` too."""
    for schedule in (Flow(), EDM()):
        data, made, noise = Data(schedule), objective(MeanFlowConfig(power=0.0), schedule), Noise.from_seeds(range(300))
        x0, beside = 0.5 * noise.normal((1,), "x0"), Beside(teacher=Teacher(Exact(data)))
        exact = network(EXACT, data, made.diffusion.prediction)
        assert made.losses(exact, x0, nothing(300), made.draw(x0, noise), beside).total.mean() < 1e-7


@pytest.mark.parametrize(("settings", "word"), [
    ({"apart": 1.1}, "apart"), ({"offset": 0.0}, "offset"), ({"power": -1.0}, "power"), ({"step": 0.0}, "step"),
    ({"derivative": "vjp"}, "derivative")])
def test_settings_that_make_no_sense(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        MeanFlowConfig(**settings)
