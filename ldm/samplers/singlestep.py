"""Singlestep rules in lambda = ln(alpha / sigma): they call the network inside the step, and remember nothing.

With h the growth of lambda over a step, the order-1 step is DDIM's, alpha_s x0 + sigma_s eps, and a rule of order n
adds how far x0 (DPM-Solver++) or eps (DPM-Solver) has changed at the parts 1/n, ..., (n - 1)/n of the step. With c the
coefficient of that end at s, and u = -h for x0, h for eps, both are the same rule:

    n = 2    x_s = (order 1) - c expm1(u) (change at 1/2)
    n = 3    x_s = (order 1) + 3/2 c (1 - expm1(u) / u) (change at 2/3)

where the stage at 2/3 is the like from the change at 1/3. Where h is infinite, from pure noise and onto t = 0, a step
is of order 1. Lu et al. 2022 (arXiv 2206.00927 and 2211.01095).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.diffusion import Denoised
from ldm.noise import Noise
from ldm.samplers.ancestral import posterior
from ldm.samplers.base import Memory, Sampler, Step, half_logsnr, mix
from ldm.schedules import Level


class Singlestep(Sampler):
    """The rule of order 2 or 3; `polynomial` names the end whose changes it integrates."""

    rises = True
    polynomial: str

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        schedule, ends = denoise.schedule, denoise(x, t)
        start, end = half_logsnr(schedule, t), half_logsnr(schedule, s)
        if not bool((end - start).isfinite()):
            return mix(schedule(s), ends), None
        change = torch.zeros_like(x)
        for part in range(1, self.order):
            h = part * (end - start) / self.order
            time = schedule.time(2 * (start + h))
            inner = denoise(self._stage(schedule(time), h, part, ends, change), time)
            change = inner.x0 - ends.x0 if self.polynomial == "x0" else inner.eps - ends.eps
        return self._stage(schedule(s), end - start, self.order, ends, change), None

    def _stage(self, level: Level, h: Tensor, part: int, ends: Denoised, change: Tensor) -> Tensor:
        """x a length h into the step, at its `part`, from the change at the part before, which is 0 at the first."""
        if part == 1:
            return mix(level, ends)
        c, u = (level.alpha, -h) if self.polynomial == "x0" else (level.sigma, h)
        weight = -c * u.expm1() if self.order == 2 else part / (part - 1) * (c * (1 - u.expm1() / u))
        return mix(level, ends) + weight * change


@dataclass(frozen=True, kw_only=True)
class DPMpp2S(Singlestep):
    """DPM-Solver++(2S): the slope of x0 at the middle of the step in lambda. Order 2, two calls a step.

    Lu et al. 2022 (arXiv 2211.01095), algorithm 1 with r = 1/2.
    """

    polynomial = "x0"
    order = calls = 2
    kind: Literal["dpmpp-2s"] = "dpmpp-2s"


@dataclass(frozen=True, kw_only=True)
class DPMSolver2(Singlestep):
    """DPM-Solver-2, as `dpmpp-2s` in eps. Order 2, two calls a step. Lu et al. 2022 (arXiv 2206.00927), algorithm 1."""

    polynomial = "eps"
    order = calls = 2
    kind: Literal["dpm-solver-2"] = "dpm-solver-2"


@dataclass(frozen=True, kw_only=True)
class DPMpp3S(Singlestep):
    """DPM-Solver++(3S): estimates of x0 at one and two thirds of the step in lambda. Order 3, three calls a step.

    Lu et al. 2022 (arXiv 2206.00927), algorithm 2, in x0.
    """

    polynomial = "x0"
    order = calls = 3
    kind: Literal["dpmpp-3s"] = "dpmpp-3s"


@dataclass(frozen=True, kw_only=True)
class DPMSolver3(Singlestep):
    """DPM-Solver-3, as `dpmpp-3s` in eps. Order 3, three calls a step. Lu et al. 2022 (arXiv 2206.00927), algorithm 2.
    """

    polynomial = "eps"
    order = calls = 3
    kind: Literal["dpm-solver-3"] = "dpm-solver-3"


@dataclass(frozen=True, kw_only=True)
class DPMppSDE2S(Sampler):
    """SDE-DPM-Solver++(2S): `ddpm`'s step by the x0 at the middle of the step in lambda, where another one leads. Order
    2 in the moments, two calls a step; the step from pure noise and the one onto t = 0 are `ddpm`'s own.

    x_s = alpha_s x0 + sigma_s e^-h eps + alpha_s (1 - e^-2h) (D_middle - x0) + sigma_s sqrt(1 - e^-2h) z. The noise of
    both is one path: z = (e^(-h/2) z_1 + z_2) / sqrt(1 + e^-h). Lu et al. 2022 (arXiv 2211.01095) for the SDE; this
    rule is k-diffusion's dpmpp_sde at r = 1/2, but for its path, which is Brownian in sigma / alpha.
    """

    order = 2
    calls = 2
    kind: Literal["dpmpp-sde-2s"] = "dpmpp-sde-2s"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        schedule, ends = denoise.schedule, denoise(x, t)
        if s == 0:
            return ends.x0, None
        level, start = schedule(s), half_logsnr(schedule, t)
        h, first = half_logsnr(schedule, s) - start, noise.normal(x.shape[1:], 0, dtype=x.dtype)
        if not bool(h.isfinite()):
            return posterior(level, ends, h, first), None
        time = schedule.time(2 * start + h)
        middle = denoise(posterior(schedule(time), ends, h / 2, first), time)
        z = (-h / 2).exp() * first + noise.normal(x.shape[1:], 1, dtype=x.dtype)
        x = posterior(level, ends, h, z / (1 + (-h).exp()).sqrt())
        return x - (level.alpha * (-2 * h).expm1()) * (middle.x0 - ends.x0), None


SAMPLERS = (DPMpp2S, DPMSolver2, DPMpp3S, DPMSolver3, DPMppSDE2S)
