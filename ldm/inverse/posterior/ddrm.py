"""Denoising diffusion restoration: each singular direction of A has its own rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.diffusion import Denoised
from ldm.inverse.operators import LinearOperator, Operator, Spectrum
from ldm.inverse.posterior.base import OneCallAStep, Problem, needs_linear
from ldm.noise import Noise
from ldm.samplers import prior
from ldm.samplers.base import noise_ratio
from ldm.schedules import NoiseSchedule


@dataclass(frozen=True, eq=False)
class _Seen:
    """What y says in each singular direction: `estimate` Y = U^T y / S of V^T x0, and `width` sigma_y / S, the standard
    deviation of its error, infinite where A sees nothing."""

    basis: Spectrum
    estimate: Tensor
    width: Tensor

    @classmethod
    def of(cls, problem: Problem) -> _Seen:
        assert isinstance(problem.operator, LinearOperator)
        basis = problem.operator.spectrum(problem.shape, problem.y)
        sees = basis.singular > 0
        singular = basis.singular.where(sees, 1)
        width = (problem.sigma_y / singular).where(sees, torch.inf)
        return cls(basis, basis.observe(problem.y) / singular, width)

    def clearer(self, schedule: NoiseSchedule, t: Tensor) -> Tensor:
        """Where y says at least as much of x0 as x_t does."""
        return self.width.isfinite() & (self.width <= noise_ratio(schedule, t))

    def around(self, schedule: NoiseSchedule, t: Tensor, centre: Tensor, weight: float, z: Tensor) -> Tensor:
        """V^T x_t about a centre that holds `weight` Y, with the noise that Y has not brought already."""
        alpha, sigma = schedule(t)
        return alpha * centre + (sigma**2 - (alpha * weight * self.width) ** 2).clamp(min=0).sqrt() * z


@dataclass(frozen=True, kw_only=True)
class DDRM(OneCallAStep):
    """In V^T x, with Y = U^T y / S, tau = sigma / alpha and X0, E for both ends there; one call a step. Where A sees

        nothing                x_s = alpha_s X0 + sigma_s (sqrt(1 - eta^2) E + eta z)
        less than x_s does     x_s = alpha_s X0 + sigma_s (sqrt(1 - eta^2) (Y - X0) S / sigma_y + eta z)
        as much, or more       x_s = alpha_s ((1 - eta_b) X0 + eta_b Y)
                                     + sqrt(sigma_s^2 - (alpha_s eta_b sigma_y / S)^2) z

    the second being tau_s < sigma_y / S. At sigma_y 0 and eta_b 1 what A sees of x0 is Y at the end. eta is not that of
    `ddim`, and the spread falls short of the posterior's: on N(0, 1) an unseen pixel has variance 0.634 at 20 steps.
    Kawar et al. 2022 (arXiv 2201.11793), eq. 6 to 8. Raises ValueError for an operator that is not linear.
    """

    limits: ClassVar = {"eta": "[0, 1]", "eta_b": "[0, 1]"}
    kind: Literal["ddrm"] = "ddrm"
    eta: float = 0.85
    eta_b: float = 1.0

    def refusal(self, operator: Operator, sigma_y: float) -> str | None:
        return needs_linear(operator)

    def walk(self, denoise: Denoise, problem: Problem, times: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        seen, schedule = _Seen.of(problem), denoise.schedule
        x = self._start(seen, schedule, times[0], prior(schedule, problem.shape, noise, problem.y.dtype))
        for index, (t, s) in enumerate(pairwise(times)):
            z = noise.normal(problem.shape, "ddrm", index, dtype=x.dtype)
            x = self._step(seen, schedule, denoise(x, t), s, z)
            yield x, s

    def _start(self, seen: _Seen, schedule: NoiseSchedule, t: Tensor, x: Tensor) -> Tensor:
        x = seen.basis.analyse(x)
        told = seen.around(schedule, t, seen.estimate, 1.0, x / schedule.prior_std)
        return seen.basis.synthesise(told.where(seen.clearer(schedule, t), x))

    def _step(self, seen: _Seen, schedule: NoiseSchedule, ends: Denoised, s: Tensor, z: Tensor) -> Tensor:
        x0, eps, z = (seen.basis.analyse(part) for part in (ends.x0, ends.eps, z))
        level = schedule(s)
        eps = eps.where(seen.width.isinf(), (seen.estimate - x0) / seen.width)
        vague = level.alpha * x0 + level.sigma * ((1 - self.eta**2) ** 0.5 * eps + self.eta * z)
        clear = seen.around(schedule, s, (1 - self.eta_b) * x0 + self.eta_b * seen.estimate, self.eta_b, z)
        return seen.basis.synthesise(clear.where(seen.clearer(schedule, s), vague))


POSTERIORS = (DDRM,)
