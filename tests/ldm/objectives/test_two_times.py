"""The objectives whose networks read how far they jump, as one family: exact maps, samplers, and small trainings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from few_step import Data, Exact, network, nothing
from torch import Tensor, nn

from ldm.backbones import DiT, UNet
from ldm.conditioning import Cond
from ldm.diffusion import Diffusion
from ldm.exact import F64
from ldm.jumps import SPAN, averaged, chord, mixed, noise_share, share_time
from ldm.noise import Noise
from ldm.objectives import Beside
from ldm.objectives.base import Draw
from ldm.objectives.few_step import FewStep, FewStepConfig
from ldm.objectives.mean_flow import MeanFlowConfig
from ldm.objectives.shortcut import TARGET, ShortcutConfig
from ldm.objectives.trajectory import TrajectoryConfig
from ldm.pairing import Independent
from ldm.predictions import EDMF, Prediction, V, Velocity
from ldm.samplers import JumpSampler, sample
from ldm.schedules import EDM, GVP, VE, VP, DDPMCosine, DDPMLinear, Flow, NoiseSchedule
from ldm.teacher import Teacher
from ldm.times import UniformTimes
from ldm.weighting import UniformWeight

SCHEDULES: list[NoiseSchedule] = [Flow(), GVP(), VP(), VE(), EDM(), DDPMLinear(), DDPMCosine(zero_terminal_snr=True)]
PREDICTIONS: list[Prediction] = [Velocity(), V(), EDMF()]
BACKBONES = [DiT(width=32, depth=2, heads=2, position="rope", qk_norm=True, gradient_checkpointing=True),
             UNet(channels=(16, 32), attention=(1,), head_dim=8, pooled=True, groups=8, gradient_checkpointing=True)]
FAMILY: list[Any] = [MeanFlowConfig(power=0.0), ShortcutConfig(), TrajectoryConfig()]


def kind_of(member: Any) -> str:
    return str(member.kind)


def built(config: FewStepConfig, schedule: NoiseSchedule, prediction: Prediction | None = None) -> FewStep:
    return config.build(diffusion=Diffusion(schedule=schedule, prediction=prediction or Velocity()),
                        times=UniformTimes(), weighting=UniformWeight(), pairing=Independent())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=kind_of)
def test_shares_of_noise_and_times(schedule: NoiseSchedule) -> None:
    """`share_time` is the inverse, at both ends too; `averaged` is the chord's pair."""
    t = torch.linspace(max(schedule.t_min, 1e-5), 1, 41, dtype=F64)
    torch.testing.assert_close(share_time(schedule, noise_share(schedule, t)), t, rtol=1e-9, atol=1e-12)
    assert share_time(schedule, torch.zeros(1, dtype=F64)) == 0
    x_t, x_s, s = torch.linspace(-1, 2, 41, dtype=F64)[:, None], torch.linspace(1, 0.4, 41, dtype=F64)[:, None], t * 0.7
    far = noise_share(schedule, t) - noise_share(schedule, s)
    z_t, z_s = (x / torch.stack([*schedule(time)]).sum(0)[:, None] for x, time in ((x_t, t), (x_s, s)))
    pair = averaged(schedule, x_t, (z_t - z_s) / far[:, None], t)
    torch.testing.assert_close(mixed(schedule, pair, s), x_s, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(pair.x0, chord(schedule, x_t, x_s, t, s).x0, rtol=1e-8, atol=1e-8)


class Flawless(Teacher):
    """A teacher whose steps go along the ODE itself."""

    def step(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        assert isinstance(self.denoiser, Exact)
        return self.denoiser.data.moved(x, t, s)


def cost(config: FewStepConfig, data: Data, prediction: Prediction, plain: bool = False) -> tuple[Tensor, Draw]:
    """What 500 samples cost an exact network of jumps, or one that answers as a denoiser whatever the span, beside a
    target of the same kind and an exact teacher."""
    if isinstance(config, TrajectoryConfig):
        config = replace(config, solver="ddim")  # which asks for `Teacher.step`
    made, noise = built(config, data.schedule, prediction), Noise.from_seeds(range(500))
    x0 = data.mean + data.std * noise.normal((1,), "x0", dtype=F64)
    answers = network(config, data, prediction, (lambda x, t, s: data.denoised(x, t)) if plain else None)
    drawn = made.draw(x0, noise)
    beside = Beside(bare=answers, networks={TARGET: answers}, teacher=Flawless(Exact(data)))
    return made.losses(answers, x0, nothing(500), drawn, beside).total, drawn


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=kind_of)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=kind_of)
@pytest.mark.parametrize("config", FAMILY, ids=kind_of)
def test_exact_maps_cost_nothing_and_denoisers_do(config: FewStepConfig, schedule: NoiseSchedule,
                                                  prediction: Prediction) -> None:
    """But for the smallest jumps of a shortcut model, whose halves are steps of Euler's: `test_shortcut` has those."""
    data = Data(schedule, 0.25, 0.3)
    exact, drawn = cost(config, data, prediction)
    if isinstance(config, ShortcutConfig):
        exact = exact[2 * drawn.more["count"] != config.steps]
    assert exact.max() < 1e-15
    plain, drawn = cost(config, data, prediction, plain=True)
    apart = drawn.t != drawn.more["s"]
    assert plain[apart].max() > 1e-3 and plain[~apart].max() < 1e-15


def std_after(config: FewStepConfig, schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """By how much N(0, .25) is spread after the sampler has walked an exact map along the times, from its own spread at
    the first."""
    data = Data(schedule)
    jumping = config.denoiser(network(config, data), Diffusion(schedule=schedule, prediction=Velocity()))
    alpha, sigma = schedule(times[0])
    x = (((alpha * data.std) ** 2 + sigma**2).sqrt()).expand(1, 1)
    return sample(JumpSampler(), jumping.bind(nothing(1)), x, times, Noise.from_seeds([0]))


@pytest.mark.parametrize("schedule", [Flow(), VP(), EDM()], ids=kind_of)
@pytest.mark.parametrize("config", FAMILY, ids=kind_of)
@pytest.mark.parametrize("times", [
    (1, 0), (1, 0.5, 0), (1, 0.75, 0.5, 0.25, 0), (1, 0.93, 0.11, 0), (0.8, 0.3, 0.29, 0)], ids=str)
def test_an_exact_map_is_exact_in_any_number_of_steps(config: FewStepConfig, schedule: NoiseSchedule,
                                                      times: tuple[float, ...]) -> None:
    end = std_after(config, schedule, torch.tensor(times, dtype=F64))
    assert end.item() == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("config", FAMILY, ids=kind_of)
def test_one_forward_learns(config: FewStepConfig) -> None:
    """The wrapped network is called once, with gradients, and all others without."""
    data, grads = Data(Flow()), []
    answers = network(config, data)

    def told(name: str) -> Callable[..., Tensor]:
        def call(*asked: Any) -> Tensor:
            grads.append((name, torch.is_grad_enabled()))
            return answers(*asked)

        return call

    made, noise = built(config, data.schedule), Noise.from_seeds(range(8))
    x0 = noise.normal((1,), "x0", dtype=F64)
    beside = Beside(bare=told("bare"), networks={TARGET: told(TARGET)}, teacher=Teacher(Exact(data)))
    made.losses(told("wrapped"), x0, nothing(8), made.draw(x0, noise), beside)
    assert [call for call in grads if call[0] == "wrapped"] == [("wrapped", True)]
    assert [call for call in grads if call[1]] == [("wrapped", True)]
    assert len(grads) > 1


@pytest.mark.parametrize("config", FAMILY, ids=kind_of)
def test_a_sample_draws_by_its_own_seed(config: FewStepConfig) -> None:
    """Whatever batch it is in: no size has a fixed place in a batch."""
    made, noise = built(config, Flow()), Noise.from_seeds(range(64))
    x0 = torch.zeros(64, 1, dtype=F64)
    whole, part = made.draw(x0, noise), made.draw(x0[5:9], noise[5:9])
    assert torch.equal(whole.t[5:9], part.t)
    assert all(torch.equal(whole.more[name][5:9], part.more[name]) for name in whole.more)
    assert bool((whole.more["s"] <= whole.t).all())


@pytest.mark.parametrize("config", FAMILY, ids=kind_of)
@pytest.mark.parametrize("backbone", BACKBONES, ids=kind_of)
def test_backbones_learn_under_autocast(config: FewStepConfig, backbone: DiT | UNet) -> None:
    """Masks, pooled text, blocks computed again and bfloat16: every weight gets a finite gradient."""
    torch.manual_seed(0)
    net = backbone.build(channels=4, context_dim=24, pooled_dim=20, numbers=(SPAN,))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    noise = Noise.from_seeds(range(6))
    mask = torch.arange(5)[None] < torch.tensor([5, 2, 3, 1, 5, 4])[:, None]
    cond = Cond(noise.normal((5, 24), "context"), mask, noise.normal((20,), "pooled"))
    made, x0 = built(config, Flow()), noise.normal((4, 8, 8), "x0")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        beside = Beside(bare=net, networks={TARGET: copy.deepcopy(net)}, teacher=Teacher(Exact(Data(Flow()))))
        loss = made.losses(net, x0, cond, made.draw(x0, noise), beside).total
    torch.autograd.backward(loss.mean())
    assert bool(loss.isfinite().all())
    gradients = {name: weight.grad for name, weight in net.named_parameters()}
    assert [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []


class Linear(nn.Module):
    """a x + b with a and b of t and span, two layers: what jumps of a Gaussian are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2)).double()

    def forward(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        y: Tensor = self.layers(torch.stack([level / 1000, cond.extras[SPAN]], dim=1))
        return y[:, :1] * x + y[:, 1:]


def trained(config: FewStepConfig, data: Data, teacher: Teacher | None, steps: int = 300, batch: int = 512) -> Linear:
    """A small network after a few hundred steps of Adam, its target an average of it."""
    made, net = built(config, data.schedule), Linear()
    target, ema = copy.deepcopy(net).requires_grad_(False), getattr(config, "ema", 0.0)
    adam = torch.optim.Adam(net.parameters(), lr=0.02)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps):
        noise = Noise.from_seeds(range(batch)).fold("training", step)
        x0 = data.mean + data.std * noise.normal((1,), "x0", dtype=F64)
        beside = Beside(step, steps, net, {TARGET: target}, teacher)
        loss = made.losses(net, x0, nothing(batch), made.draw(x0, noise), beside).total.mean()
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        rate.step()
        with torch.no_grad():
            for kept, new in zip(target.parameters(), net.parameters(), strict=True):
                kept.lerp_(new, 1 - ema)
    return net


@pytest.mark.parametrize(("config", "taught"), [
    (MeanFlowConfig(power=0.0, apart=0.5, derivative="finite-difference", step=1e-3), False),
    (ShortcutConfig(ema=0.9, bootstrap=0.5), False), (TrajectoryConfig(ema=0.9), True)], ids=lambda part: str(part)[:8])
def test_one_step_is_learned(config: FewStepConfig, taught: bool) -> None:
    """Of N(.3, .25), from its data or from the exact teacher, where a denoiser's one step gives .3 for any noise."""
    data = Data(Flow(), 0.5, 0.3)
    net = trained(config, data, Teacher(Exact(data)) if taught else None)
    noise = Noise.from_seeds(range(20_000)).fold("drawing")
    jumping = config.denoiser(net, Diffusion(schedule=data.schedule, prediction=Velocity())).bind(nothing(20_000))
    z, times = noise.normal((1,), "z", dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    with torch.no_grad():
        end = sample(JumpSampler(), jumping, z, times, noise)
    assert end.mean().item() == pytest.approx(0.3, abs=0.03)
    assert end.std().item() == pytest.approx(0.5, rel=0.06)
