"""Reflow against exact answers: what straight ways cost, and that pairs in one dimension are fitted exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from few_step import Data, Exact, at, drawn, network, nothing, values
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion import Denoised, Diffusion
from ldm.exact import F64, Mixture, end_of_ode
from ldm.jumps import beside
from ldm.noise import Noise
from ldm.objectives import OBJECTIVES, Beside, Denoising
from ldm.objectives.base import Draw
from ldm.objectives.few_step import FewStep
from ldm.objectives.reflow import NOISE, Reflow, ReflowConfig
from ldm.pairing import Independent, MinibatchOT
from ldm.predictions import PREDICTIONS, X0, Prediction, Velocity
from ldm.samplers import Euler, JumpSampler, sample
from ldm.schedules import SCHEDULES, Flow, NoiseSchedule
from ldm.teacher import Teacher
from ldm.times import LossAware, TimeSampling, UniformTimes
from ldm.uncertainty import Weighed
from ldm.weighting import SNR, MinSNR, UniformWeight, Weighting

FLOW = Flow(t_min=0.0)
UNIFORM = UniformTimes()
MODES = torch.tensor([[0.3, -1.0, 0.2], [0.7, 0.6, 0.4]], dtype=F64)  # weight, mean and std of each


def objective(schedule: NoiseSchedule = FLOW, prediction: Prediction | None = None,
              times: TimeSampling = UNIFORM, weighting: Weighting | None = None, **settings: Any) -> Reflow:
    built = ReflowConfig(**settings).build(
        diffusion=Diffusion(schedule=schedule, prediction=prediction or Velocity()), times=times,
        weighting=weighting or UniformWeight(), pairing=Independent())
    assert isinstance(built, Reflow)
    return built


def paired(eps: Tensor) -> Cond:
    """A condition of no content beside which stands the noise of pairs."""
    return beside(nothing(len(eps)), NOISE, eps)  # type: ignore[no-any-return]


def level(*times: float) -> Draw:
    """A draw at given times; its noise is not that of the pairs."""
    return drawn(at(*times), torch.full((len(times), 1), 7.0, dtype=F64))


def quadrature(nodes: int = 40) -> tuple[Tensor, Tensor]:
    """Points of [0, 1] and their weights, Gauss-Legendre."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy(x + 1) / 2, torch.from_numpy(w) / 2


@pytest.mark.parametrize(("schedule", "prediction"), [
    (schedule(), prediction()) for schedule in SCHEDULES for prediction in PREDICTIONS
    if prediction().refusal(schedule()) is None], ids=lambda part: part.kind)
def test_it_is_the_denoising_loss_of_the_pair(schedule: NoiseSchedule, prediction: Prediction) -> None:
    """Weighed by noise level and by what the network expects; the network is told all but the noise of the pairs."""
    noise, told = Noise.from_seeds(range(6)), []
    x0, eps = (noise.normal((2, 3), key, dtype=F64) for key in ("x0", "pair"))
    t = schedule.trained(at(0.02, 0.2, 0.5, 0.7, 0.9, 1.0))
    factor, weighting = at(1, 2, 3, 1, 1, 0.5), MinSNR()

    def call(inputs: Tensor, level: Tensor, cond: Cond) -> Weighed:
        told.append(sorted(cond.extras))
        return Weighed(torch.tanh(inputs) + cond.extras["image"], level.float() / 2000)

    cond = beside(paired(eps), "image", torch.full((6, 1, 1), 0.1, dtype=F64))
    found = objective(schedule, prediction, weighting=weighting).losses(
        call, x0, cond, drawn(t, torch.zeros_like(eps))._replace(factor=factor))
    plain = Denoising(diffusion=Diffusion(schedule=schedule, prediction=prediction), times=UNIFORM, weighting=weighting)
    wanted = plain.losses(call, x0, cond, drawn(t, eps)._replace(factor=factor))
    torch.testing.assert_close(found.total, wanted.total, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.seen, wanted.seen, rtol=1e-4, atol=1e-6)
    assert told == [["image"], [NOISE, "image"]]


@pytest.mark.parametrize(("std", "cost"), [(0.25, 0.3926991), (0.5, 0.7853982), (1.0, 1.5707963), (2.0, 3.1415927)])
def test_what_independent_pairs_cost_an_exact_denoiser(std: float, cost: float) -> None:
    """E ||(eps - x0) - v||^2 over times is std pi / 2: no network costs less on pairs that are none."""
    made, data = objective(), Data(FLOW, std)
    exact = network(made.config, data, pair=lambda x, t, s: data.denoised(x, t))
    t, weights = quadrature()
    # What is missed is a line in x0 and eps: its mean square is the sum of those of their deviations.
    rows = [made.losses(exact, x0.expand(len(t), 1), paired(eps.expand(len(t), 1)), level(*t.tolist())).total
            for x0, eps in ((values(std), values(0.0)), (values(0.0), values(1.0)))]
    assert (weights * sum(rows)).sum().item() == pytest.approx(cost, abs=1e-6)
    assert cost == pytest.approx(std * math.pi / 2, abs=1e-7)


@pytest.mark.parametrize(("std", "bent"), [(0.25, 0.1073009), (0.5, 0.2146018), (1.0, 0.4292037), (2.0, 0.8584073)])
def test_how_straight_the_ode_is(std: float, bent: float) -> None:
    """The velocity along the ODE's own way misses that of the straight one by 2 std - std pi / 2; of a perfect student
    of its pairs, by nothing: these cost it nothing either."""
    made, data = objective(), Data(FLOW, std)
    t, weights = quadrature()
    end = values(1.0).expand(len(t), 1)
    start = data.moved(end, torch.ones_like(t), torch.zeros_like(t))
    ends = Teacher(Exact(data))(data.moved(end, torch.ones_like(t), t), t, nothing(len(t)))
    missed = ((end - start) - (ends.eps - ends.x0)).square().flatten()
    assert (weights * missed).sum().item() == pytest.approx(bent, abs=1e-6)
    assert bent == pytest.approx(2 * std - std * math.pi / 2, abs=1e-7)

    def straight(x: Tensor, t: Tensor, s: Tensor) -> Denoised:
        z = x / (std * (1 - t) + t)[:, None]
        return Denoised(std * z, z)

    perfect = network(made.config, data, pair=straight)
    assert made.losses(perfect, start, paired(end), level(*t.tolist())).total.max() < 1e-12
    exact = network(made.config, data, pair=lambda x, t, s: data.denoised(x, t))
    assert (weights * made.losses(exact, start, paired(end), level(*t.tolist())).total).sum() > 0.01 * bent


def mixture(schedule: NoiseSchedule) -> Mixture:
    """Two unequal modes on the line."""
    weights, means, stds = MODES.unbind(1)
    return Mixture(schedule, weights, means[:, None], stds.square()[:, None, None])


def solved(rises: Any, goal: Tensor) -> Tensor:
    """Where a function that rises has the value `goal`, in [-12, 12]."""
    low, high = torch.full_like(goal, -12), torch.full_like(goal, 12)
    for _ in range(60):
        middle = (low + high) / 2
        above = rises(middle) > goal
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def quantile(z: Tensor) -> Tensor:
    """F^-1(Phi(z)) of the mixture: the map that keeps the order."""
    weights, means, stds = MODES.unbind(1)
    return solved(lambda x: (weights * torch.special.ndtr((x - means) / stds)).sum(-1, keepdim=True),
                  torch.special.ndtr(z))


def reflowed(x: Tensor, t: Tensor, s: Tensor) -> Denoised:
    """The minimiser of the loss on pairs (z, F^-1(Phi(z))): no two straight ways meet, so x at t is of one pair."""
    part = t.expand(len(x))[:, None]
    z = solved(lambda z: (1 - part) * quantile(z) + part * z, x)
    return Denoised(quantile(z), z)


def test_one_exact_reflow_is_straight_on_the_line() -> None:
    z = values(-2.2, -1.0, -0.5, 0.0, 0.4, 1.0, 2.5)
    x0 = end_of_ode(mixture, FLOW, z, at(1)[0], 800)
    torch.testing.assert_close(x0, quantile(z), rtol=0, atol=1e-6)
    made = objective()
    student = network(made.config, Data(FLOW), pair=reflowed)
    for t in (0.02, 0.1, 0.5, 0.9, 1.0):
        assert made.losses(student, x0, paired(z), level(*[t] * 7)).total.max() < 1e-10
    denoise = made.student(student).bind(nothing(7))
    one = sample(JumpSampler(), denoise, z, at(1, 0), Noise.from_seeds(range(7)))
    torch.testing.assert_close(one, x0, rtol=0, atol=1e-6)
    seven = sample(Euler(variable="t"), denoise, z, at(1, 0.8, 0.7, 0.4, 0.35, 0.2, 0), Noise.from_seeds(range(7)))
    torch.testing.assert_close(seven, one, rtol=0, atol=1e-9)
    before = network(made.config, Data(FLOW), pair=lambda x, t, s: Denoised(*mixture(FLOW)(x, t[0])[:2]))
    assert made.losses(before, x0, paired(z), level(*[0.5] * 7)).total.mean() > 0.01


@pytest.mark.parametrize("schedule", [cls() for cls in SCHEDULES], ids=lambda schedule: schedule.kind)
def test_the_least_loss_at_pure_noise_is_the_map_of_the_pairs(schedule: NoiseSchedule) -> None:
    """The loss is a square of the answer: one step of Newton's from any answer, and one jump lands at x0."""
    prediction = Velocity() if Velocity().refusal(schedule) is None else X0()
    made, seeds = objective(schedule, prediction, at_noise=1.0), Noise.from_seeds(range(5))
    x0, eps = (seeds.normal((4,), key, dtype=F64) for key in ("x0", "pair"))
    answer = torch.zeros(5, 4, dtype=F64, requires_grad=True)
    draw = made.draw(x0, seeds)
    made.losses(lambda *_: answer, x0, paired(eps), draw).total.sum().backward()  # type: ignore[no-untyped-call]
    assert answer.grad is not None
    fitted = (answer - answer.grad * 4 / 2).detach()
    alpha, sigma = schedule(at(1)[0])
    start = alpha * x0 + sigma * eps
    end = sample(JumpSampler(), made.student(lambda *_: fitted).bind(nothing(5)), start, at(1, 0), seeds)
    torch.testing.assert_close(end, x0, rtol=1e-5, atol=1e-4 if sigma > 1 else 1e-5)


def test_a_share_is_trained_at_pure_noise() -> None:
    """As many as asked for, by a number of their own; whose losses count once, however seldom other times come."""
    x0, noise = torch.zeros(4000, 1, dtype=F64), Noise.from_seeds(range(4000))
    seen = torch.linspace(0.1, 3, 100, dtype=F64)
    draws = {share: objective(times=LossAware(), at_noise=share).draw(x0, noise, seen=seen) for share in (0, 0.3, 1)}
    last = draws[0.3].t == 1
    assert last.double().mean().item() == pytest.approx(0.3, abs=0.02)
    plain = FewStep.draw(objective(times=LossAware()), x0, noise, seen=seen)
    for name in ("t", "factor", "eps"):
        assert torch.equal(getattr(draws[0], name), getattr(plain, name))
        assert torch.equal(getattr(draws[0.3], name)[~last], getattr(plain, name)[~last])
    assert torch.equal(draws[0.3].factor[last], torch.ones(int(last.sum()), dtype=F64)) and plain.factor[last].std() > 0
    assert (draws[1].t == 1).all() and draws[0].t.max() < 1
    fewer = objective(at_noise=0.3).draw(x0[:9], noise[slice(9)])
    assert torch.equal(fewer.t == 1, last[:9])
    assert last.double().std() and abs(torch.corrcoef(torch.stack([last.double(), plain.t]))[0, 1]) < 0.05


def test_validation_is_of_the_pair() -> None:
    """The square distance of one jump from x0 of the pair, whatever the teacher would make of another noise."""
    made, data = objective(), Data(FLOW)
    x0, eps, t = values(0.3, -0.6), values(1.2, -0.1), at(0.4, 0.9)
    exact = network(made.config, data, pair=lambda x, t, s: data.denoised(x, t))
    found = made.at(exact, x0, paired(eps), t, torch.full_like(eps, 5.0), Beside(teacher=Teacher(Exact(Data(FLOW, 3)))))
    x_t = (1 - t[:, None]) * x0 + t[:, None] * eps
    wanted = (data.denoised(x_t, t).x0 - x0).square().flatten()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-9)


class Texts(NamedTuple):
    """What a text encoder that learns is yet to read."""

    texts: Sequence[str]
    extras: dict[str, Tensor]


def test_captions_stand_for_a_condition() -> None:
    told: list[Any] = []

    def call(inputs: Tensor, level: Tensor, cond: Any) -> Tensor:
        told.append(cond)
        return inputs

    objective().losses(call, values(0.1), Texts(["red"], {NOISE: values(1.0)}), level(0.5))  # type: ignore[arg-type]
    assert told == [Texts(["red"], {})]


def test_what_is_refused() -> None:
    made, x0 = objective(), values(0.1, 0.2)
    with pytest.raises(ValueError, match=r"no noise beside them .*distill_denoiser --teacher RUN"):
        made.losses(lambda x, *_: x, x0, nothing(2), level(0.5, 0.5))
    with pytest.raises(ValueError, match="noise of pairs is"):
        made.losses(lambda x, *_: x, x0, paired(torch.zeros(2, 3, dtype=F64)), level(0.5, 0.5))
    with pytest.raises(ValueError, match=r"at_noise must be in \[0, 1\]"):
        ReflowConfig(at_noise=1.5)
    with pytest.raises(ValueError, match=r"weighting.kind snr counts t = 1 0 times.*uniform"):
        objective(FLOW, weighting=SNR(), at_noise=0.1)
    assert objective(FLOW, weighting=SNR()).config.at_noise == 0
    with pytest.raises(ValueError, match="independent"):
        ReflowConfig().build(diffusion=made.diffusion, times=UNIFORM, weighting=UniformWeight(), pairing=MinibatchOT())


def test_what_the_config_says() -> None:
    config = ReflowConfig()
    assert (config.taught, config.at_noise, config.companions(), config.reads) == ("yes", 0.0, {}, ())
    assert [kind().kind for kind in OBJECTIVES if kind().pairs] == ["reflow"]
    assert objective().student(lambda x, *_: x).spans is False
