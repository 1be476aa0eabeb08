"""Conditional denoisers whose answers are known exactly."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Conditional, Denoise
from ldm.diffusion import Denoised
from ldm.schedules import NoiseSchedule


def cond(flag: float, batch: int) -> Cond:
    """The condition `flag`, as a context of one number."""
    return Cond(torch.full((batch, 1, 1), flag), torch.ones(batch, 1, dtype=torch.bool))


@dataclass(frozen=True)
class Exact(Conditional):
    """The denoiser of N(m, 1/4) on any process, m the condition's number: linear, so that its samples are known."""

    process: NoiseSchedule

    @property
    def schedule(self) -> NoiseSchedule:
        return self.process

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        (alpha, sigma), mean = self.process(t), cond.context[:, 0].to(x.dtype)
        variance = alpha**2 / 4 + sigma**2
        return Denoised(mean + (x - alpha * mean) * alpha / 4 / variance, (x - alpha * mean) * sigma / variance)


@dataclass(frozen=True)
class Fixed(Conditional):
    """An oracle that no condition changes."""

    oracle: Denoise

    @property
    def schedule(self) -> NoiseSchedule:
        return self.oracle.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        return self.oracle(x, t)


@dataclass(frozen=True)
class TwoGaussians(Conditional):
    """The exact denoiser of N(1, 1/4) under the condition 1 and of N(0, 5/4) under the condition 0, element by element.

    On `flow` the ODE guided by w ends in N(m, (0.5^w 1.25^((1 - w) / 2))^2). Notes the names of the extras that it is
    told, and the batch.
    """

    process: NoiseSchedule
    seen: list[tuple[list[str], int]] = field(default_factory=list)

    @property
    def schedule(self) -> NoiseSchedule:
        return self.process

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        self.seen.append((sorted(cond.extras), len(x)))
        shape = -1, *[1] * (x.ndim - 1)
        mean = cond.context[:, 0, 0].to(x.dtype).view(shape)
        alpha, sigma = (part.to(x.dtype).expand(len(x)).view(shape) for part in self.process(t))
        variance = 1.25 - mean
        residual = (x - alpha * mean) / (alpha**2 * variance + sigma**2)
        return Denoised(mean + alpha * variance * residual, sigma * residual)
