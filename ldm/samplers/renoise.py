"""Solvers that step back towards noise on their way: EDM's churn and restart sampling.

Noise put in by the forward process is exact, and what the solver got wrong before is shrunk with the sample when the
noise is taken out again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.noise import Noise
from ldm.samplers.base import Memory, Sampler, Step, noise_ratio
from ldm.samplers.ode import Heun, Variable
from ldm.schedules import NoiseSchedule


def renoised(schedule: NoiseSchedule, x: Tensor, t: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """x at s > t by the forward process: (alpha_s / alpha_t) x + sqrt(sigma_s^2 - (alpha_s sigma_t / alpha_t)^2) z."""
    above = schedule(s)
    spread = above.sigma * (-(schedule.logsnr(s) - schedule.logsnr(t)).expm1()).sqrt()
    return (above.alpha / schedule(t).alpha) * x + spread * z


@dataclass(frozen=True, kw_only=True)
class HeunChurn(Sampler):
    """Each step first raises sigma / alpha by `churn` with fresh noise of `noise_scale`, then walks down by `heun`.

    `churn` is EDM's S_churn divided by its number of steps, at most sqrt(2) - 1: the same rule at any number of steps.
    Only where sigma / alpha lies between `ratio_min` and `ratio_max`, and where the process reaches so high. Its bias
    is of the churn's size, whatever the step. 0 is `heun` itself. The defaults are those of ImageNet at 64 pixels: 40
    of 256 steps. Karras et al. 2022 (arXiv 2206.00364), algorithm 2 and table 5.
    """

    calls = 2
    limits: ClassVar = {"churn": f"[0, {2**0.5 - 1}]", "ratio_min": "[0, ratio_max]", "noise_scale": "[0, inf)"}
    kind: Literal["heun-churn"] = "heun-churn"
    churn: float = 0.15625
    ratio_min: float = 0.05
    ratio_max: float = 50.0
    noise_scale: float = 1.003
    variable: Variable = "sigma"

    @property
    def order(self) -> int:
        return 0 if self.churn else Heun.order

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        schedule = denoise.schedule
        if self.churn and self.ratio_min <= noise_ratio(schedule, t) <= self.ratio_max:
            above = schedule.time(schedule.logsnr(t) - 2 * math.log1p(self.churn))
            if t < above <= 1:
                z = self.noise_scale * noise.normal(x.shape[1:], "churn", dtype=x.dtype)
                x, t = renoised(schedule, x, t, above, z), above
        return Heun(variable=self.variable).step(denoise, x, t, s, None, noise)


@dataclass(frozen=True, kw_only=True)
class Restart(Sampler):
    """`heun`, and at the first time where sigma / alpha is at most an interval's low end, `repeats` times: noise up to
    its high end, and `inner_steps` of `heun` down again.

    `intervals` are pairs (low, high) of sigma / alpha; the high end is cut to the schedule's own. On data N(0, s^2) one
    repeat shrinks an error of the variance by (s^2 + low^2) / (s^2 + high^2). An interval that no time of the grid
    above 0 reaches does nothing; inner times are those of `karras`. Xu et al. 2023 (arXiv 2306.14878), algorithm 1.
    """

    order = calls = 0
    limits: ClassVar = {"repeats": "[0, inf)", "inner_steps": "[1, inf)"}
    kind: Literal["restart"] = "restart"
    intervals: tuple[tuple[float, float], ...] = ((0.06, 0.3),)
    repeats: int = 2
    inner_steps: int = 3
    variable: Variable = "sigma"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < low < high for low, high in self.intervals):
            raise ValueError(f"restart intervals must be pairs 0 < low < high of sigma / alpha, got {self.intervals}")

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        heun, schedule = Heun(variable=self.variable), denoise.schedule
        x, _ = heun.step(denoise, x, t, s, None, noise)
        before, after = (noise_ratio(schedule, time).item() for time in (t, s))
        for index, (low, high) in enumerate(self.intervals):
            if s >= schedule.t_min and 0 < after <= low < before:
                inner = self._inner(schedule, s, after, high)
                for repeat in range(self.repeats):
                    z = noise.normal(x.shape[1:], "restart", index, repeat, dtype=x.dtype)
                    x = renoised(schedule, x, s, inner[0], z)
                    for a, b in pairwise(inner.unbind()):
                        x, _ = heun.step(denoise, x, a, b, None, noise)
        return x, None

    def _inner(self, schedule: NoiseSchedule, s: Tensor, low: float, high: float) -> Tensor:
        most = noise_ratio(schedule, torch.ones_like(s)).item()
        ends = torch.tensor([min(high, most), low], dtype=torch.float64) ** (1 / 7)
        ratios = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, self.inner_steps + 1, dtype=torch.float64)) ** 7
        return torch.cat([schedule.time(-2 * ratios[:-1].log()).clamp(max=1), s[None]])


SAMPLERS = (HeunChurn, Restart)
