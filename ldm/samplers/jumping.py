"""Samplers of few-step models, which answer where x_t is at another time: one call a step, and few steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.jumps import jumping
from ldm.noise import Noise
from ldm.samplers.base import Memory, Sampler, Step, mix


@dataclass(frozen=True, kw_only=True)
class JumpSampler(Sampler):
    """x_s = alpha_s x0 + sigma_s eps of the model's jump from t to s: exact where the model is, however few its steps.

    `noise` in [0, 1] is the share of sigma_s that is fresh noise: the jump goes to a lower time, of sigma / alpha
    sqrt(1 - noise^2) times that of s, and noise takes it back up (Kim et al. 2023, arXiv 2310.02279, gamma-sampling).
    """

    order = 0
    jumps = True
    limits: ClassVar = {"noise": "[0, 1]"}
    kind: Literal["jump"] = "jump"
    noise: float = 0.0

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        schedule, (alpha, sigma) = denoise.schedule, denoise.schedule(s)
        if not self.noise or s == 0:
            return mix(schedule(s), jumping(denoise).jump(x, t, s)), None
        kept = (1 - self.noise**2) ** 0.5
        low = schedule.time(schedule.logsnr(s) - 2 * torch.tensor(kept, dtype=s.dtype).log()) if kept else s * 0
        below = schedule(low)
        x = (alpha / below.alpha) * mix(below, jumping(denoise).jump(x, t, low))
        return x + self.noise * sigma * noise.normal(x.shape[1:], "jump", dtype=x.dtype), None


@dataclass(frozen=True, kw_only=True)
class ConsistencySampler(Sampler):
    """x_s = alpha_s f + sigma_s z with fresh noise z: f is where the model's jump from t to the clean end lands.

    Song et al. 2023 (arXiv 2303.01469), algorithm 1. On data N(0, s^2) the exact f gives the variance s^2, in one step
    as in many.
    """

    order = 0
    jumps = True
    kind: Literal["consistency"] = "consistency"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        clean = torch.zeros_like(t)
        f = mix(denoise.schedule(clean), jumping(denoise).jump(x, t, clean))
        alpha, sigma = denoise.schedule(s)
        return (f if s == 0 else alpha * f + sigma * noise.normal(x.shape[1:], "consistency", dtype=x.dtype)), None


SAMPLERS = (JumpSampler, ConsistencySampler)
