"""Split Gibbs sampling: z given x and y, then x given z by the reverse process, in turn, while z nears x."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.grids import Karras
from ldm.inverse.operators import LinearOperator, Operator, Spectrum
from ldm.inverse.posterior.base import Posterior, Problem, needs_linear
from ldm.noise import Noise
from ldm.samplers import DDPM, DPMppSDE2M, sample
from ldm.samplers.base import noise_ratio
from ldm.schedules import NoiseSchedule

_WALKS = {sampler.kind: sampler for sampler in (DPMppSDE2M(), DDPM())}


@dataclass(frozen=True, eq=False)
class Likelihood:
    """N(y; A z, sigma_y^2 I), and what it makes of z ~ N(x, rho^2 I), exactly, in the singular directions of A.

    `absorb`: rho counts as a part of the noise: what is left for y about A z has the variance sigma_y^2 - rho^2 S^2 in
    a direction of singular value S, or none where that is below 0.
    """

    basis: Spectrum
    observed: Tensor
    sigma_y: float
    absorb: bool = False

    @classmethod
    def of(cls, problem: Problem, absorb: bool = False) -> Likelihood:
        """Of a problem with a linear operator."""
        assert isinstance(problem.operator, LinearOperator)
        basis = problem.operator.spectrum(problem.shape, problem.y)
        return cls(basis, basis.observe(problem.y), problem.sigma_y, absorb)

    @property
    def small_enough(self) -> float:
        """Half the largest rho that leaves no bias, sigma_y over the largest singular value; 0 as published."""
        return self.absorb * self.sigma_y / max(2 * self.basis.singular.max().item(), 1e-12)

    def draw(self, x: Tensor, rho: Tensor, z: Tensor) -> Tensor:
        """z ~ N with precision A^T A / noise + I / rho^2, about the mean of x and y, by a standard normal z.

        It divides by rho^2 S^2 + noise, so that the noise may be 0: what A sees is y then.
        """
        singular = self.basis.singular
        moved = (rho * singular) ** 2
        noise = (self.sigma_y**2 - self.absorb * moved).clamp(min=0)
        total, sees = moved + noise, singular > 0
        total = total.where(sees, 1)
        gain = (rho**2 * singular / total).where(sees, 0)
        std = rho * (noise / total).sqrt().where(sees, 1)
        x = self.basis.analyse(x)
        return self.basis.synthesise(x + gain * (self.observed - singular * x) + std * self.basis.analyse(z))


@dataclass(frozen=True, kw_only=True)
class SplitGibbs(Posterior):
    """Each iteration draws z | x, y, of precision A^T A / sigma_y^2 + I / rho^2, then x | z from p(x) N(z; x, rho^2 I):
    the reverse process from alpha z at the time where sigma / alpha is rho. The linear operator's spectrum makes the
    first exact.

    Calibrated: as published, without `absorb`, the draws of x settle at a fixed rho on p(x) N(y; A x, sigma_y^2 I +
    rho^2 A A^T), for any prior. With it z | x, y is drawn as if the noise's variance were sigma_y^2 - rho^2 S^2, 0 at
    least, for each singular value S: so x has max(sigma_y, rho S)^2 there, and the law is the posterior, without bias,
    once rho S is sigma_y or less. It is also reached sooner: where rho S is sigma_y, what is seen of x is drawn from y
    anew, and not moved by a part of rho.

    The walk starts from x = 0, with rho falling from `rho_max` in equal ratios over 5/6 of the iterations: to
    `rho_min`, or, with `absorb`, to half of where there is no bias left: a smaller one would only move slower, and of a
    larger one the inner walk would lose more of the variance. Iterations are the steps of the grid, whose own times are
    not used; each makes `inner_steps` network calls. On Gaussian data 15 or 30 iterations of 8 calls leave the
    variances within 5 % of the posterior's at a sigma_y of 0.05 to 0.5 (15 as published within 55 %), by the error of
    the inner walk. rho is cut to what the process reaches, at least twice its least sigma / alpha.
    Wu et al. 2024 (arXiv 2405.18782), algorithm 1; Xu & Chi 2024 (arXiv 2403.17042).
    Raises ValueError for an operator that is not linear.
    """

    limits: ClassVar = {"rho_max": "(0, inf)", "rho_min": "(0, rho_max]", "inner_steps": "[2, inf)"}
    kind: Literal["split-gibbs"] = "split-gibbs"
    rho_max: float = 10.0
    rho_min: float = 0.02
    inner_steps: int = 8
    absorb: bool = True
    sampler: Literal["dpmpp-sde-2m", "ddpm"] = "dpmpp-sde-2m"

    def refusal(self, operator: Operator, sigma_y: float) -> str | None:
        return needs_linear(operator)

    def calls(self, grid: Tensor) -> int:
        return (len(grid) - 1) * self.inner_steps

    def walk(self, denoise: Denoise, problem: Problem, times: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        likelihood = Likelihood.of(problem, self.absorb)
        x = problem.y.new_zeros(len(problem.y), *problem.shape)
        for index, rho in enumerate(self.levels(len(times) - 1, denoise.schedule, likelihood.small_enough)):
            x = self.iterate(denoise, likelihood, x, rho, noise.fold("iteration", index))
            yield x, times[-1]

    def levels(self, iterations: int, schedule: NoiseSchedule, enough: float = 0.0) -> Tensor:
        """rho of each iteration, float64; none below `enough`."""
        falling = max(iterations * 5 // 6 - 1, 1)
        share = (torch.arange(iterations, dtype=torch.float64) / falling).clamp(max=1)
        ends = torch.tensor([max(schedule.t_min, 1e-5), 1], dtype=torch.float64)
        least, most = noise_ratio(schedule, ends).unbind()
        last = min(max(self.rho_min, enough), self.rho_max)
        return (self.rho_max * (last / self.rho_max) ** share).clamp(2 * least, most)

    def iterate(self, denoise: Denoise, likelihood: Likelihood, x: Tensor, rho: Tensor, noise: Noise) -> Tensor:
        """x after a draw of z about it and a draw of x about z."""
        z = likelihood.draw(x, rho, noise.normal(x.shape[1:], "split", dtype=x.dtype))
        times = self.inner(rho, denoise.schedule)
        return sample(_WALKS[self.sampler], denoise, denoise.schedule(times[0]).alpha * z, times, noise)

    def inner(self, rho: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The times from sigma / alpha = rho to a tenth of it as `karras` spaces them, then 0."""
        times = Karras(sigma_min=rho.item() / 10, sigma_max=rho.item()).visits(self.inner_steps, schedule)
        return torch.cat([schedule.time(-2 * rho.log()).clamp(max=1)[None], times[1:]])


POSTERIORS = (SplitGibbs,)
