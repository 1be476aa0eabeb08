"""Shortcut models against exact answers: sizes, halves, and the step that a perfect model takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from few_step import Data, Exact, at, drawn, network, nothing, values
from torch import Tensor

from ldm.diffusion import Denoised, Diffusion
from ldm.exact import F64
from ldm.jumps import noise_share
from ldm.noise import Noise
from ldm.objectives import Beside
from ldm.objectives.shortcut import TARGET, Shortcut, ShortcutConfig
from ldm.pairing import Independent
from ldm.predictions import Velocity
from ldm.samplers import JumpSampler, sample
from ldm.schedules import EDM, VP, DDPMLinear, Flow, NoiseSchedule
from ldm.teacher import Teacher
from ldm.times import LossAware, TimeSampling, UniformTimes
from ldm.weighting import UniformWeight

FLOW = Flow(t_min=0.0)


def objective(config: ShortcutConfig | None = None, schedule: NoiseSchedule = FLOW,
              times: TimeSampling | None = None) -> Shortcut:
    made = (config or ShortcutConfig()).build(
        diffusion=Diffusion(schedule=schedule, prediction=Velocity()), times=times or UniformTimes(),
        weighting=UniformWeight(), pairing=Independent())
    assert isinstance(made, Shortcut)
    return made


def velocity(pair: Denoised) -> float:
    return (pair.eps - pair.x0).item()


def test_two_halves_of_an_exact_map() -> None:
    """G(.5) at x = t = 1, halves of .5: .5. Were x not moved by the first half it would be .5465558."""
    made, data, x, one = objective(), Data(FLOW), values(1.0), at(1)
    net = network(made.config, data)
    assert velocity(made.halves(net, x, one, at(0), one, nothing(1))) == pytest.approx(0.5, abs=1e-12)
    unmoved = (velocity(data.jump(x, one, at(0.5))) + velocity(data.jump(x, at(0.5), at(0)))) / 2
    assert unmoved == pytest.approx(0.5465558, abs=1e-7)


@pytest.mark.parametrize(("steps", "std"), [(2, 0.2), (4, 0.3405405), (128, 0.4942451)])
def test_a_perfect_student_takes_the_steps_of_euler_in_one(steps: int, std: float) -> None:
    """Of every size what two of its halves give, the smallest halves being a denoiser's steps."""
    made, data = objective(ShortcutConfig(steps=steps)), Data(FLOW)

    def pair(x: Tensor, t: Tensor, s: Tensor) -> Denoised:
        if torch.equal(s, t):
            return data.denoised(x, t)
        assert bool((t - s > 1.5 / steps).all())  # no shorter span is asked for
        return made.halves(net, x, t, s, (1 / (t - s)).round(), nothing(len(x)))

    net = network(made.config, data, pair=pair)
    end = sample(JumpSampler(), made.student(net).bind(nothing(1)), values(1.0), at(1, 0), Noise.from_seeds([0]))
    assert end.item() == pytest.approx(std, abs=1e-7)


def test_what_an_exact_map_costs_in_the_smallest_jump() -> None:
    """At (1; 0, 1) of two Euler steps: they end at .2 and not .5, an average velocity of .8 and not .5: .09."""
    made, data = objective(ShortcutConfig(steps=2)), Data(FLOW)
    net = network(made.config, data)
    draw = drawn(at(1), values(1.0), s=at(0), count=at(1))
    loss = made.losses(net, values(0.0), nothing(1), draw, Beside(networks={TARGET: net})).total
    assert loss.item() == pytest.approx(0.09, abs=1e-7)


def test_what_does_not_jump_learns_to_denoise() -> None:
    """From the data and its noise, or from what the teacher answers."""
    made, data, x0, eps, t = objective(), Data(FLOW), values(0.3, -0.7), values(1.2, 0.4), at(0.2, 1.0)
    net, draw = network(made.config, data), drawn(t, eps, s=t, count=t * 0)
    v = data.denoised(made.diffusion.perturb(x0, eps, t), t)
    beside = Beside(networks={TARGET: lambda *asked: net(*asked) + 5})
    loss = made.losses(net, x0, nothing(2), draw, beside).total
    torch.testing.assert_close(loss, (v.eps - v.x0 - eps + x0).float().square()[:, 0])
    assert made.losses(net, x0, nothing(2), draw, beside._replace(teacher=Teacher(Exact(data)))).total.max() < 1e-15


def test_it_jumps_with_the_average() -> None:
    """A wrong network that learns does not move its own target, and a wrong average does."""
    made, data = objective(), Data(FLOW)
    exact, draw = network(made.config, data), drawn(at(1), values(1.0), s=at(0), count=at(1))

    def wrong(*asked: Any) -> Tensor:
        return exact(*asked) + 0.1

    def cost(learning: Any, average: Any) -> float:
        beside = Beside(bare=learning, networks={TARGET: average})
        return made.losses(learning, values(0.0), nothing(1), draw, beside).total.item()

    assert cost(exact, exact) < 1e-15
    assert cost(wrong, exact) == pytest.approx(0.01, rel=1e-6)
    moved = velocity(made.halves(wrong, values(1.0), at(1), at(0), at(1), nothing(1)))
    assert moved != pytest.approx(0.5, abs=0.01)
    assert cost(exact, wrong) == pytest.approx((moved - 0.5) ** 2, rel=1e-6)


@pytest.mark.parametrize("schedule", [Flow(), VP(), EDM(), DDPMLinear()], ids=lambda schedule: schedule.kind)
def test_draws(schedule: NoiseSchedule) -> None:
    """A quarter of the samples jump: by each size as often, and from each of its places, in any batch however small."""
    made, noise, count = objective(schedule=schedule), Noise.from_seeds(range(28_000)), 28_000
    draw = made.draw(torch.zeros(count, 1), noise)
    sizes, s = draw.more["count"], draw.more["s"]
    still = sizes == 0
    assert still.double().mean().item() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(draw.t[still], made.times.draw(noise.uniform((), "time"), schedule)[0][still])
    assert torch.equal(s[still], draw.t[still])
    whole = noise_share(schedule, at(1)).item()
    for exponent in range(7):
        of_size = sizes == 2**exponent
        assert of_size.sum().item() == pytest.approx(1000, abs=150)
        top, bottom = (noise_share(schedule, time[of_size]) / whole * 2**exponent for time in (draw.t, s))
        places = bottom.round()
        assert set(places.tolist()) == set(range(2**exponent)) or exponent > 5
        atol = 1e-9 if schedule.kind != "ddpm-linear" else 0.25  # the times of a table are its entries
        torch.testing.assert_close(bottom, places, rtol=0, atol=1e-9)
        torch.testing.assert_close(top, places + 1, rtol=0, atol=atol)
        shares = places.long().bincount(minlength=2**exponent) if exponent < 3 else None
        assert shares is None or shares.min() > 0.7 * shares.max()
    assert set(sizes.tolist()) == {0, 1, 2, 4, 8, 16, 32, 64}


def test_loss_aware_factors_are_those_of_drawn_times_alone() -> None:
    seen, made = torch.tensor([9.0, 1.0], dtype=F64), objective(times=LossAware(bins=2))
    draw = made.draw(torch.zeros(400, 1), Noise.from_seeds(range(400)), seen=seen)
    jumps = draw.more["count"] > 0
    assert torch.equal(draw.factor[jumps], torch.ones(int(jumps.sum()), dtype=F64)) and (draw.factor[~jumps] != 1).all()


def test_the_average_and_its_settings() -> None:
    kept = ShortcutConfig(ema=0.9).companions()[TARGET].kept
    assert kept is not None and kept(0, 10) == kept(9, 10) == 0.9
    assert math.log2(ShortcutConfig().steps) == 7
    with pytest.raises(ValueError, match="power of two, got 96"):
        ShortcutConfig(steps=96)
    with pytest.raises(ValueError, match="bootstrap"):
        ShortcutConfig(bootstrap=0.0)
