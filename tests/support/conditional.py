"""Conditional denoisers whose answers are known exactly."""

from __future__ import annotations

from dataclasses import dataclass

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
