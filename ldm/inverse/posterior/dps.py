"""Diffusion posterior sampling as published: a step of the prior, then one down the norm of the residual."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.denoiser import Bound, Denoise
from ldm.diffusion import Denoised
from ldm.inverse.linearised import leaf_of
from ldm.inverse.operators import Operator
from ldm.inverse.posterior.base import OneCallAStep, Problem
from ldm.noise import Noise
from ldm.samplers import DDPM, prior


@dataclass(frozen=True, kw_only=True)
class DPS(OneCallAStep):
    """x_s = (the `ddpm` step) - zeta grad_{x_t} ||y - A x0(x_t)||, the norm of each sample. One call a step.

    Not calibrated: it does not read sigma_y, and the residual it ends with is set by zeta, the number of steps and the
    size of y. In x0 the pull of a step is zeta / (alpha_s (1 - e^2)), e = alpha_t sigma_s / (alpha_s sigma_t), so that
    zeta belongs to one grid: the published values are for 1000 steps, 0.5 for random masks, 0.3 for super-resolution
    and blur, and zeta 0 is the prior. Chung et al. 2023 (arXiv 2209.14687), algorithm 1, with the norm of its
    experiments in place of the square.
    """

    differentiates = True
    limits: ClassVar = {"zeta": "[0, inf)"}
    kind: Literal["dps"] = "dps"
    zeta: float = 0.3
    variance: Literal["small", "large", "learned"] = "small"

    def refusal(self, operator: Operator, sigma_y: float) -> str | None:
        return None

    def walk(self, denoise: Denoise, problem: Problem, times: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        rule = DDPM(variance=self.variance)
        x = prior(denoise.schedule, problem.shape, noise, problem.y.dtype)
        for index, (t, s) in enumerate(pairwise(times)):
            ends, gradient = _pulled(denoise, problem, x, t)
            x, _ = rule.step(_answering(denoise, ends), x, t, s, None, noise.fold("step", index))
            x = x - self.zeta * gradient
            yield x, s


def _pulled(denoise: Denoise, problem: Problem, x: Tensor, t: Tensor) -> tuple[Denoised, Tensor]:
    """Both ends of x, and the gradient in x of each sample's ||y - A x0||, 0 where that norm is."""
    with torch.enable_grad():
        leaf = leaf_of(x)
        ends = denoise(leaf, t)
        residual = problem.y - problem.operator(ends.x0)
    each = residual.detach()
    norm = each.flatten(1).norm(dim=1).view(-1, *[1] * (each.ndim - 1))
    (gradient,) = torch.autograd.grad(residual, leaf, each / norm.clamp(min=torch.finfo(norm.dtype).tiny))
    fraction = ends.log_var_frac
    return Denoised(ends.x0.detach(), ends.eps.detach(), None if fraction is None else fraction.detach()), gradient


def _answering(denoise: Denoise, ends: Denoised) -> Denoise:
    """A denoiser that has been called already."""
    return Bound(denoise.schedule, lambda x, t: ends)


POSTERIORS = (DPS,)
