"""The training loss of a denoiser: weight(t) ||network(c_in x_t, noise level, cond) - y||^2.

A time and a noise are drawn for each sample, x_t = alpha x0 + sigma eps is made, and the network's answer is compared
with the target y = a x0 + b eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion import Diffusion
from ldm.noise import Noise
from ldm.objectives.base import ALONE, Beside, Draw, Losses, Objective, ObjectiveConfig, Trained
from ldm.pairing import Independent, Pairing
from ldm.schedules import match, per_sample
from ldm.times import Places, TimeSampling
from ldm.uncertainty import Weighed
from ldm.variational import bound_at
from ldm.weighting import Weighting


@dataclass(frozen=True, kw_only=True)
class Denoising(Objective):
    """weight(t) ||network(c_in x_t, noise level, cond) - y||^2, a mean over all but the batch.

    x0 (B, ...) are normalised latents; noise has one seed per sample, folded by the caller with the training step. With
    a learned variance T / 1000 times the variational bound is added, through which only the variance learns (Nichol &
    Dhariwal 2021, arXiv 2102.09672, eq. 16); where the network answers `Weighed` the loss is divided by exp(u) and u
    is added. Raises ValueError where the schedule has no such times.
    """

    diffusion: Diffusion
    times: TimeSampling
    weighting: Weighting
    pairing: Pairing = Independent()  # noqa: RUF009  # frozen, without state

    def __post_init__(self) -> None:
        self.times.draw(torch.full((1,), 0.5, dtype=torch.float64), self.diffusion.schedule)

    def draw(self, x0: Tensor, noise: Noise, places: Places | None = None, seen: Tensor | None = None,
             cond: Cond | Sequence[str] | None = None) -> Draw:
        """See `Objective.draw`; ValueError where stratified times lack the places of their samples."""
        t, factor = self.times.drawn(noise, self.diffusion.schedule, places, seen)
        return Draw(t, self.pairing(x0, noise.normal(x0.shape[1:], "eps", dtype=x0.dtype), cond), factor)

    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw, beside: Beside = ALONE) -> Losses:
        error, y, log_var, x_t = self._compared(backbone, x0, cond, draw.t, draw.eps)
        loss = match(self.weighting(self.diffusion, draw.t), error) * error
        if log_var is not None:
            loss = loss * (-log_var).exp() + log_var
        if self.diffusion.learned_variance:
            schedule, (mean, v) = self.diffusion.schedule, y.chunk(2, dim=1)
            ends = self.diffusion.recover(x_t, torch.cat([mean.detach(), v], dim=1), draw.t)
            loss = loss + bound_at(schedule, ends, x0, draw.t).float() * (schedule.steps / 1000)
        return Losses(match(draw.factor, loss) * loss, loss)

    def answered(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw) -> tuple[Tensor, Draw]:
        if self.diffusion.learned_variance:
            raise ValueError("a learned variance is that of data around the answer: the answer alone teaches none")
        x_t, answer = self._asked(backbone, x0, cond, draw.t, draw.eps)
        ends = self.diffusion.recover(x_t, answer[0] if isinstance(answer, Weighed) else answer, draw.t)
        return ends.x0, draw._replace(eps=ends.eps)

    def at(self, backbone: Trained, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor, beside: Beside = ALONE) -> Tensor:
        return self._compared(backbone, x0, cond, t, eps)[0]

    def _compared(self, backbone: Trained, x0: Tensor, cond: Cond, t: Tensor,
                  eps: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The error, the prediction and its expected loss where there is one, and x_t."""
        x_t, answer = self._asked(backbone, x0, cond, t, eps)
        y, log_var = answer if isinstance(answer, Weighed) else (answer, None)
        told = y.chunk(2, dim=1)[0] if self.diffusion.learned_variance else y
        error = told.float() - self.diffusion.target(x0, eps, t).float()
        return error.square().flatten(1).mean(1), y, log_var, x_t

    def _asked(self, backbone: Trained, x0: Tensor, cond: Cond, t: Tensor,
               eps: Tensor) -> tuple[Tensor, Tensor | Weighed]:
        """x_t, and what the network says of it."""
        x_t = self.diffusion.perturb(x0, eps, t)
        inputs, level = self.diffusion.condition(x_t, t)
        return x_t, backbone(inputs, per_sample(level, x_t), cond)


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig(ObjectiveConfig):
    """Config of `Denoising`, which has no key of its own."""

    kind: Literal["denoising"] = "denoising"

    def build(self, *, diffusion: Diffusion, times: TimeSampling, weighting: Weighting, pairing: Pairing) -> Denoising:
        return Denoising(diffusion=diffusion, times=times, weighting=weighting, pairing=pairing)


OBJECTIVES = (DenoisingConfig,)
