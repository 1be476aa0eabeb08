"""ReSample: every few steps the estimate of x0 is fitted to y, and x_s drawn about the fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.inverse.linearised import leaf_of
from ldm.inverse.operators import Operator
from ldm.inverse.posterior.base import OneCallAStep, Problem
from ldm.noise import Noise
from ldm.samplers import mix, prior
from ldm.samplers.base import noise_ratio
from ldm.schedules import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class ReSample(OneCallAStep):
    """`ddim`, and after the first third of the steps, at each `every`th counted from the last, x_s drawn about

        fit = argmin ||y - A x0||^2 from the network's x0:  x_s ~ N(w alpha_s fit + (1 - w) x_s', w sigma_s^2),

    x_s' being the step's own and w = g / (1 + g), g = gamma (tau_t^2 - tau_s^2), tau = sigma / alpha: the paper's
    sigma_r^2 is g sigma_s^2, its gamma 40. The last step ends with the fit. The fit takes at most `iterations` steps of
    Adam of size `rate`, without weight decay, and of a sample no more once its residual has the size of sigma_y. One
    network call a step; A may be any differentiable operator, with a decoder before it. Not calibrated. Song et al.
    2023 (arXiv 2307.08123), algorithm 1 and proposition 1.
    """

    differentiates = True
    limits: ClassVar = {"every": "[1, inf)", "gamma": "[0, inf)", "iterations": "[1, inf)", "rate": "(0, inf)"}
    kind: Literal["resample"] = "resample"
    every: int = 5
    gamma: float = 40.0
    iterations: int = 100
    rate: float = 0.02

    def refusal(self, operator: Operator, sigma_y: float) -> str | None:
        return None

    def walk(self, denoise: Denoise, problem: Problem, times: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        x, steps = prior(denoise.schedule, problem.shape, noise, problem.y.dtype), len(times) - 1
        for index, (t, s) in enumerate(pairwise(times)):
            ends = denoise(x, t)
            x = mix(denoise.schedule(s), ends)
            if 3 * index >= steps and (steps - 1 - index) % self.every == 0:
                fit = self.fitted(problem, ends.x0)
                z = noise.normal(problem.shape, "resample", index, dtype=x.dtype)
                x = fit if s == 0 else self.resampled(denoise.schedule, fit, x, t, s, z)
            yield x, s

    def resampled(self, schedule: NoiseSchedule, fit: Tensor, x: Tensor, t: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """x_s between the step's own and the fit noised anew, by the draw z."""
        gain = self.gamma * (noise_ratio(schedule, t) ** 2 - noise_ratio(schedule, s) ** 2)
        weight, (alpha, sigma) = 1 / (1 + 1 / gain), schedule(s)
        return weight * alpha * fit + (1 - weight) * x + weight.sqrt() * sigma * z

    def fitted(self, problem: Problem, x0: Tensor) -> Tensor:
        """The x0 near the given one whose A x0 is y to within sigma_y."""
        fit, mean, square = x0, torch.zeros_like(x0), torch.zeros_like(x0)
        for count in range(1, self.iterations + 1):
            with torch.enable_grad():
                leaf = leaf_of(fit)
                residual = (problem.y - problem.operator(leaf)).flatten(1)
            each = residual.detach()
            # What A cannot see has no residual, whatever x0 is.
            error = each.square().sum(1) / each.count_nonzero(1).clamp(min=1)
            far = (error > problem.sigma_y**2).view(-1, *[1] * (x0.ndim - 1))
            if not bool(far.any()):
                break
            (gradient,) = torch.autograd.grad(residual, leaf, 2 * each)
            mean, square = mean.lerp(gradient, 0.1), square.lerp(gradient.square(), 0.001)
            step = mean / (1 - 0.9**count) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
            fit = (fit - self.rate * step).where(far, fit)
        return fit


POSTERIORS = (ReSample,)
