"""Few-step models whose answer is exact: networks that take N(mean, std^2) along its probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Conditional
from ldm.diffusion import Denoised, Diffusion
from ldm.exact import F64
from ldm.jumps import SPAN, chord, noise_share
from ldm.objectives import Draw
from ldm.objectives.base import ObjectiveConfig
from ldm.predictions import Prediction, Velocity
from ldm.schedules import EDM, Flow, NoiseSchedule, Table, match

NOTHING = Cond(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))


def nothing(batch: int) -> Cond:
    """A condition of no content for a batch."""
    return NOTHING.expand(batch)


def at(*times: float) -> Tensor:
    """Times (B,) float64."""
    return torch.tensor(times, dtype=F64)


def values(*x: float) -> Tensor:
    """Samples (B, 1) float64."""
    return torch.tensor(x, dtype=F64)[:, None]


@dataclass(frozen=True)
class Data:
    """N(mean, std^2), element by element, under a schedule: the exact denoiser of (x, t (B,)), and its ODE."""

    schedule: NoiseSchedule
    std: float = 0.5
    mean: float = 0.0

    def denoised(self, x: Tensor, t: Tensor) -> Denoised:
        """Both ends as an exact denoiser sees them."""
        alpha, sigma = (match(part, x) for part in self.schedule(t))
        residual = (x - alpha * self.mean) / ((alpha * self.std) ** 2 + sigma**2)
        return Denoised(self.mean + alpha * self.std**2 * residual, sigma * residual)

    def moved(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s on the ODE's way through x at t: residuals go as the roots of alpha^2 std^2 + sigma^2."""
        (a_t, b_t), (a_s, b_s) = self.schedule(t), self.schedule(s)
        grown = (((a_s * self.std) ** 2 + b_s**2) / ((a_t * self.std) ** 2 + b_t**2)).sqrt()
        return match(a_s, x) * self.mean + (x - match(a_t, x) * self.mean) * match(grown, x)

    def jump(self, x: Tensor, t: Tensor, s: Tensor) -> Denoised:
        """The exact jump: the chord of the ODE, and the denoiser's own answer where s = t."""
        far = (t - s).abs() > 1e-12
        there, own = chord(self.schedule, x, self.moved(x, t, s), t, torch.where(far, s, t / 2)), self.denoised(x, t)
        pick = far.view(-1, *[1] * (x.ndim - 1)) if far.ndim else far
        return Denoised(torch.where(pick, there.x0, own.x0), torch.where(pick, there.eps, own.eps))


@dataclass(frozen=True)
class Exact(Conditional):
    """A conditional denoiser of known data: a teacher."""

    data: Data

    @property
    def schedule(self) -> NoiseSchedule:
        return self.data.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        return self.data.denoised(x, t)


def time_of(schedule: NoiseSchedule, level: Tensor) -> Tensor:
    """The time that a network was told as `level`; of a table it is told the index, from 0."""
    if isinstance(schedule, Table):
        return (level + 1) / schedule.steps
    return (4 * level).exp() / 80 if isinstance(schedule, EDM) else level / 1000


def network(config: ObjectiveConfig, data: Data, prediction: Prediction | None = None,
            pair: Callable[[Tensor, Tensor, Tensor], Denoised] | None = None) -> Callable[..., Tensor]:
    """A network of an objective that answers `pair(x_t, t, s)`, by default the data's exact jump: to the time that it
    is told, and where it is told none, to the clean end. Its own reading turns the answer back into that pair."""
    diffusion, schedule = Diffusion(schedule=data.schedule, prediction=prediction or Velocity()), data.schedule
    answer = pair or data.jump

    def call(inputs: Tensor, level: Tensor, cond: Cond) -> Tensor:
        t = time_of(schedule, level)
        x = inputs / match(schedule.input_scale(t), inputs)
        s = torch.zeros_like(t)
        if SPAN in config.reads:
            share = (noise_share(schedule, t) - cond.extras[SPAN]).clamp(min=0)
            s = schedule.time(2 * ((1 - share) / share).log()).clamp(0, 1)
            s = torch.where(cond.extras[SPAN].abs() < 1e-12, t, torch.where(share < 1e-14, 0.0, s))
        assert config.reading is not None
        none = config.reading(diffusion, x, torch.zeros_like(x), t).x0
        one = config.reading(diffusion, x, torch.ones_like(x), t).x0
        slope = one - none  # every reading is a line in y, and at the boundary a level one
        return torch.where(slope == 0, 0.0, (answer(x, t, s).x0 - none) / slope)

    return call


def flow_process() -> Diffusion:
    """Velocity on `flow`."""
    return Diffusion(schedule=Flow(), prediction=Velocity())


def drawn(t: Tensor, eps: Tensor, **more: Tensor) -> Draw:
    """A draw at given times and noise."""
    return Draw(t, eps, torch.ones_like(t), more)

