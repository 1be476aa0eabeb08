"""Continuous-time consistency models on TrigFlow, on any process by its angle.

Lu & Song 2024 (arXiv 2410.11081), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.conditioning import Cond
from ldm.diffusion import Denoised, dot
from ldm.jumps import plainly
from ldm.noise import Noise
from ldm.objectives.base import ALONE, Beside, Draw, Losses, Trained
from ldm.objectives.derivative import along
from ldm.objectives.few_step import FewStep, FewStepConfig
from ldm.schedules import NoiseSchedule, match


class Angle(NamedTuple):
    """cos and sin of phi = atan(sigma / (sigma_data alpha)), the factor from x_t to TrigFlow's x = cos phi x0 + sin phi
    sigma_data eps, and dt / d phi: (B,) float64."""

    cos: Tensor
    sin: Tensor
    scale: Tensor
    pace: Tensor


def angle(schedule: NoiseSchedule, t: Tensor, sigma_data: float) -> Angle:
    """Where t is on TrigFlow; finite from the clean end to pure noise."""
    (alpha, sigma), rates = schedule(t), schedule.rates(t)
    signal = alpha * sigma_data
    whole = signal**2 + sigma**2
    pace = whole / (sigma_data * (alpha * rates.sigma - sigma * rates.alpha))
    return Angle(signal / whole.sqrt(), sigma / whole.sqrt(), sigma_data / whole.sqrt(), pace)


class TrigFlow(FewStep):
    """||F - F- - g / (||g|| + c)||^2, with the tangent g of f = cos phi x - sin phi sigma_data F, times cos phi:

    g = -cos^2 phi (sigma_data F- - dx/d phi) - r cos phi sin phi (x + sigma_data dF-/d phi).

    F is of the pair that the network predicts, whatever it predicts: F = cos phi eps - sin phi x0 / sigma_data, and so
    f its x0. dx/d phi = cos phi sigma_data eps - sin phi x0 is the teacher's, else that of sample and noise. r rises to
    1 over the first share `warmup` of the training. Errors count as those of the network's prediction, times the
    weighting: `edm` and `learned` count those of F, as published. At pure noise itself g is 0: what is learned just
    below is what the network says there.
    """

    config: TrigFlowConfig

    def further(self, x0: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        return {}

    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw, beside: Beside = ALONE) -> Losses:
        x_t = self.diffusion.perturb(x0, draw.eps, draw.t)
        way = Denoised(x0, draw.eps) if beside.teacher is None else beside.teacher(x_t, draw.t, cond)
        ends, expected = self.jump(backbone, x_t, draw.t, draw.t, cond)
        with torch.no_grad():
            bare = backbone if beside.bare is None else beside.bare
            g = self.tangent(bare, x_t, way, draw.t, cond, ends, self.config.rise(beside.step, beside.steps))
            step = g / (dot(g, g).sqrt() + self.config.c)
            at = angle(self.diffusion.schedule, draw.t, self.config.sigma_data)
            goal = Denoised(ends.x0 - match(at.sin * self.config.sigma_data, x_t) * step,
                            ends.eps + match(at.cos, x_t) * step)
        return self.counted(self.error(ends, goal, draw.t), draw, expected)

    def tangent(self, bare: Trained, x_t: Tensor, way: Denoised, t: Tensor, cond: Any, ends: Denoised,
                rise: float) -> Tensor:
        """g (B, ...) where the network answers `ends`, along the way of x_t to both ends of `way`."""
        at, data = angle(self.diffusion.schedule, t, self.config.sigma_data), self.config.sigma_data
        x = match(at.scale, x_t) * x_t
        dx = match(at.cos * data, x) * way.eps - match(at.sin, x) * way.x0
        slope = self.slope(bare, x_t, way, t, cond)
        first = data * self.trig(ends, t) - dx
        return -match(at.cos**2, x) * first - match(rise * at.cos * at.sin, x) * (x + data * slope)

    def slope(self, bare: Trained, x_t: Tensor, way: Denoised, t: Tensor, cond: Any) -> Tensor:
        """dF-/d phi along x_t' = alpha' x0 + sigma' eps, by steps of a variable u that goes with t.

        A difference of `h` in u is one of `h` in phi; but of at most 1000 h in the noise level, whose highest frequency
        is 1, and of t / 8, so that it stays above the clean end. u is 1 where t is, so that none is taken beyond.
        """
        schedule, config = self.diffusion.schedule, self.config
        pace, rates = angle(schedule, t, config.sigma_data).pace, schedule.rates(t)
        _, levels, *_ = torch.func.jvp(schedule.noise_level, (t,), (torch.ones_like(t),))
        speed = pace.minimum(1000 / levels).minimum(t / (8 * config.h)).clamp(min=1e-9)  # dt / du
        u0 = 1 - ((1 - t) / speed).clamp(max=0.5)
        dx = match(rates.alpha, x_t) * way.x0 + match(rates.sigma, x_t) * way.eps

        def answer(x: Tensor, u: Tensor) -> Tensor:
            time = t + speed * (u - u0)
            return self.trig(self.jump(bare, x, time, time, cond)[0], time)

        _, slope = along(answer, x_t, u0, match(speed, dx) * dx, config.derivative, config.h)
        return match(pace / speed, slope) * slope

    def trig(self, ends: Denoised, t: Tensor) -> Tensor:
        """F of a pair at t."""
        at = angle(self.diffusion.schedule, t, self.config.sigma_data)
        return match(at.cos, ends.eps) * ends.eps - match(at.sin / self.config.sigma_data, ends.x0) * ends.x0


@dataclass(frozen=True, kw_only=True)
class TrigFlowConfig(FewStepConfig, Checked):
    """Config of `TrigFlow`. `derivative` says how dF-/d phi is had, `h` is the step of a difference in phi."""

    kind: Literal["scm"] = "scm"
    sigma_data: float = 0.5
    warmup: float = 0.1
    c: float = 0.1
    derivative: Literal["jvp", "finite-difference"] = "jvp"
    h: float = 1e-4
    taught = "either"
    reading = staticmethod(plainly)
    made = TrigFlow
    limits: ClassVar = {"sigma_data": "(0, inf)", "warmup": "[0, 1]", "c": "(0, inf)", "h": "(0, 0.05]"}

    def rise(self, step: int, steps: int) -> float:
        """r at a step of the training."""
        return min(step / (self.warmup * steps), 1.0) if self.warmup else 1.0

    def plan(self, step: int, steps: int) -> str:
        """Whether r still rises."""
        return "the warm-up of the tangent" if self.rise(step, steps) < 1 else "the whole tangent"


OBJECTIVES = (TrigFlowConfig,)
