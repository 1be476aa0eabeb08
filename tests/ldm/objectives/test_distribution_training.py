"""Small trainings by distribution matching, turn by turn, in float64: what the generator makes is what its teacher's
data are."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from few_step import Data, Exact, nothing
from matching import FLOW, REAL, Affine, Linear, denoising, objective, quadrature
from torch import Tensor, nn

from ldm.conditioning import Cond
from ldm.denoiser import Conditional
from ldm.diffusion import Denoised
from ldm.exact import F64
from ldm.noise import Noise
from ldm.objectives import Beside, Draw
from ldm.objectives.distribution import DMD, FAKE
from ldm.schedules import NoiseSchedule, match
from ldm.teacher import Teacher


class Net(nn.Module):
    """A velocity of one number, of it and the time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = nn.Linear(2, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1)
        self.layers = nn.Sequential(*parts).double()

    def forward(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        answer: Tensor = self.layers(torch.cat([x, level[:, None] / 1000], 1))
        return answer


def train(made: DMD, generator: nn.Module, fake: nn.Module | None, teacher: Conditional, rates: tuple[float, float],
          steps: int, draws: Callable[[int], Draw], weight: Tensor) -> None:
    """Turn by turn, as a training does, at rates that fall to zero; without a fake network, the exact one of an
    `Affine` stands for it."""
    optimisers = [torch.optim.Adam(part.parameters(), betas=(0.0, 0.99)) if part else None
                  for part in (generator, fake)]
    for step in range(steps):
        turn = 0 if made.config.generates(step) else 1
        if (optimiser := optimisers[turn]) is None:
            continue
        known = fake or denoising(generator.data)  # type: ignore[arg-type]
        draw, beside = draws(step), Beside(step, steps, generator, {FAKE: known}, Teacher(teacher))
        optimiser.param_groups[0]["lr"] = rates[turn] * (1 - step / steps)
        optimiser.zero_grad()
        (made.losses(generator, draw.eps, nothing(len(weight)), draw, beside).total * weight).sum().backward()
        optimiser.step()


@pytest.mark.parametrize("learned", [False, True], ids=["exact", "learned"])
def test_a_generator_of_a_gaussian_reaches_it(learned: bool) -> None:
    """m + s z from N(.2, .64) to N(1, .25): with the exact fake denoiser, and with a linear one that learns from 0."""
    generator, (draw, weight) = Affine(), quadrature(6)
    fake = Linear() if learned else None
    train(objective(), generator, fake, Exact(REAL), (0.05, 0.05), 1200, lambda step: draw, weight)
    assert [generator.mean.item(), generator.std.item()] == pytest.approx([1, 0.5], rel=0.02 if learned else 1e-3)


@dataclass(frozen=True)
class Modes(Conditional):
    """Three tenths of N(-1, .25^2), the rest of N(1, .25^2)."""

    schedule: NoiseSchedule = FLOW

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        both = [Data(FLOW, 0.25, mean).denoised(x, t) for mean in (-1, 1)]
        alpha, sigma = (match(part, x) for part in FLOW(t))
        off = torch.cat([(x - alpha * mean) ** 2 / ((alpha / 4) ** 2 + sigma**2) for mean in (-1, 1)], 1)
        share = (torch.tensor([0.3, 0.7], dtype=F64).log() - off / 2).softmax(1)
        return Denoised(*((share * torch.cat(ends, 1)).sum(1, keepdim=True)
                          for ends in ([end.x0 for end in both], [end.eps for end in both])))

    @staticmethod
    def samples(draw: Draw) -> Tensor:
        return torch.where(draw.more["time"][:, None] < 0.3, -1, 1) + 0.25 * draw.eps

    @staticmethod
    def quantiles(count: int) -> Tensor:
        grid = torch.linspace(-3, 3, 60001, dtype=F64)
        below = [share * torch.special.ndtr((grid - mean) * 4) for share, mean in ((0.3, -1), (0.7, 1))]
        return grid[torch.searchsorted(below[0] + below[1], (torch.arange(count, dtype=F64) + 0.5) / count)]


def made(generator: nn.Module) -> Tensor:
    """What it makes in one step, at the quantiles of its noise, in order."""
    z = torch.special.ndtri((torch.arange(2000, dtype=F64) + 0.5) / 2000)[:, None]
    with torch.no_grad():
        x: Tensor = z - generator(z, torch.full((2000,), 1000, dtype=F64), nothing(2000))
    return x[:, 0].sort().values


def test_a_small_network_learns_two_modes_in_one_step() -> None:
    """From a denoiser, whose one step gives their mean, with a fake network that is its copy at first."""
    generator, teacher, count = Net(), Modes(), 64

    def draws(step: int) -> Draw:
        seeds = range(step * count, (step + 1) * count)
        return objective().draw(torch.zeros(count, 1, dtype=F64), Noise.from_seeds(seeds))

    optimiser = torch.optim.Adam(generator.parameters(), 3e-3)
    for step in range(300):
        draw = draws(-1 - step)
        x_t = objective().diffusion.perturb(Modes.samples(draw), draw.more["diffusing"], draw.t)
        ends = teacher(x_t, draw.t, nothing(count))
        optimiser.zero_grad()
        (generator(x_t, 1000 * draw.t, nothing(count)) - (ends.eps - ends.x0)).square().mean().backward()
        optimiser.step()
    goal = Modes.quantiles(2000)
    assert (made(generator) - goal).abs().mean().item() > 0.55
    weight = torch.full((count,), 1 / count, dtype=F64)
    train(objective(), generator, deepcopy(generator), teacher, (5e-3, 5e-3), 900, draws, weight)
    assert (made(generator) - goal).abs().mean().item() < 0.3
    assert (made(generator) > 0).double().mean().item() == pytest.approx(0.7, abs=0.1)
