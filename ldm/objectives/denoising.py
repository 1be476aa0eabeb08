"""The training loss of a denoiser: weight(t) ||network(c_in x_t, noise level, cond) - y||^2.

A time and a noise are drawn for each sample, x_t = alpha x0 + sigma eps is made, and the network's answer is compared
with the target y = a x0 + b eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checks import Checked
from ldm.conditioning import Cond
from ldm.diffusion import Diffusion
from ldm.noise import Noise
from ldm.objectives.base import ALONE, Beside, Draw, Losses, Objective, ObjectiveConfig, Trained
from ldm.pairing import Independent, Pairing
from ldm.representation import Represented
from ldm.schedules import match, per_sample
from ldm.times import Places, TimeSampling
from ldm.uncertainty import Weighed
from ldm.variational import bound_at
from ldm.weighting import Weighting

Answer = Tensor | Weighed | Represented
GROUP = 8  # consecutive places of a global batch that are held against each other, wherever it is split


@dataclass(frozen=True, kw_only=True)
class Denoising(Objective):
    """weight(t) ||network(c_in x_t, noise level, cond) - y||^2, a mean over all but the batch.

    x0 (B, ...) are normalised latents; noise has one seed per sample, folded by the caller with the training step. With
    a learned variance T / 1000 times the variational bound is added, through which only the variance learns (Nichol &
    Dhariwal 2021, arXiv 2102.09672, eq. 16); where the network answers `Weighed` the loss is divided by exp(u) and u
    is added. Raises ValueError where the schedule has no such times.

    `direction` times 1 - cos of the answer and y, over the channels of each place, is added (Yao et al. 2025,
    arXiv 2501.01423, section 3.3); `contrastive` times the squared distance to the target of another sample is
    taken off: the one before it in its group of `GROUP` places (Stoica et al. 2025, arXiv 2506.05350). The best answer
    is then (y - contrastive E[y'])/(1 - contrastive), not y: samples move away from what all have in common. Where the
    network answers `Represented` its features' cost is added, whatever the time.
    """

    diffusion: Diffusion
    times: TimeSampling
    weighting: Weighting
    pairing: Pairing = Independent()  # noqa: RUF009  # frozen, without state
    direction: float = 0.0
    contrastive: float = 0.0

    def __post_init__(self) -> None:
        self.times.draw(torch.full((1,), 0.5, dtype=torch.float64), self.diffusion.schedule)

    def draw(self, x0: Tensor, noise: Noise, places: Places | None = None, seen: Tensor | None = None,
             cond: Cond | Sequence[str] | None = None) -> Draw:
        """See `Objective.draw`; ValueError where stratified times lack the places of their samples."""
        t, factor = self.times.drawn(noise, self.diffusion.schedule, places, seen)
        return Draw(t, self.pairing(x0, noise.normal(x0.shape[1:], "eps", dtype=x0.dtype), cond), factor)

    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw, beside: Beside = ALONE) -> Losses:
        x_t, answer = self._asked(backbone, x0, cond, draw.t, draw.eps)
        told, target, y, log_var = self._compared(answer, x0, draw.t, draw.eps)
        error = squared(told - target) + self._beside(told, target)
        loss = match(self.weighting(self.diffusion, draw.t), error) * error
        if log_var is not None:
            loss = loss * (-log_var).exp() + log_var
        if self.diffusion.learned_variance:
            schedule, (mean, v) = self.diffusion.schedule, y.chunk(2, dim=1)
            ends = self.diffusion.recover(x_t, torch.cat([mean.detach(), v], dim=1), draw.t)
            loss = loss + bound_at(schedule, ends, x0, draw.t).float() * (schedule.steps / 1000)
        total = match(draw.factor, loss) * loss
        if isinstance(answer, Represented):
            return Losses(total + answer.cost, loss, features=answer.cost)
        return Losses(total, loss)

    def answered(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw) -> tuple[Tensor, Draw]:
        if self.diffusion.learned_variance:
            raise ValueError("a learned variance is that of data around the answer: the answer alone teaches none")
        x_t, answer = self._asked(backbone, x0, cond, draw.t, draw.eps)
        ends = self.diffusion.recover(x_t, _parts(answer)[0], draw.t)
        return ends.x0, draw._replace(eps=ends.eps)

    def at(self, backbone: Trained, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor, beside: Beside = ALONE) -> Tensor:
        told, target, _, _ = self._compared(self._asked(backbone, x0, cond, t, eps)[1], x0, t, eps)
        return squared(told - target)

    def _compared(self, answer: Answer, x0: Tensor, t: Tensor,
                  eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What is told and the target, in float32; the whole prediction and its expected loss where there is one."""
        y, log_var = _parts(answer)
        told = y.chunk(2, dim=1)[0] if self.diffusion.learned_variance else y
        return told.float(), self.diffusion.target(x0, eps, t).float(), y, log_var

    def _beside(self, told: Tensor, target: Tensor) -> Tensor | float:
        """What direction and contrast add to the error."""
        if not (self.direction or self.contrastive):
            return 0.0
        more = torch.zeros(len(told), device=told.device)
        if self.direction:
            more = more + self.direction * (1 - F.cosine_similarity(told, target, dim=1)).flatten(1).mean(1)
        if self.contrastive:
            other = target.view(-1, GROUP, *target.shape[1:]).roll(1, 1).flatten(0, 1)
            more = more - self.contrastive * squared(told - other)
        return more

    def _asked(self, backbone: Trained, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor) -> tuple[Tensor, Answer]:
        """x_t, and what the network says of it."""
        x_t = self.diffusion.perturb(x0, eps, t)
        inputs, level = self.diffusion.condition(x_t, t)
        return x_t, backbone(inputs, per_sample(level, x_t), cond)


def squared(error: Tensor) -> Tensor:
    """The mean square of each sample, (B,)."""
    return error.square().flatten(1).mean(1)


def _parts(answer: Answer) -> tuple[Tensor, Tensor | None]:
    """The prediction, and the logarithm of its expected loss where that is learned."""
    told = answer.answer if isinstance(answer, Represented) else answer
    return told if isinstance(told, Weighed) else (told, None)


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig(ObjectiveConfig, Checked):
    """Config of `Denoising`: the weights of what is added to the squared error."""

    kind: Literal["denoising"] = "denoising"
    direction: float = 0.0
    contrastive: float = 0.0
    limits: ClassVar = {"direction": "[0, inf)", "contrastive": "[0, 1)"}

    @property
    def group(self) -> int:
        return GROUP if self.contrastive else 1

    def build(self, *, diffusion: Diffusion, times: TimeSampling, weighting: Weighting, pairing: Pairing) -> Denoising:
        return Denoising(diffusion=diffusion, times=times, weighting=weighting, pairing=pairing,
                         direction=self.direction, contrastive=self.contrastive)


OBJECTIVES = (DenoisingConfig,)
