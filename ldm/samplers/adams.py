"""Adams-Bashforth rules on eps: with r = sigma / alpha the ODE is d(x / alpha) / dr = eps, and eps is extrapolated.

x_s = alpha_s x0 + sigma_s eps + alpha_s sum_j C_j (eps_j - eps) over earlier eps_j. The rules differ in the variable in
which eps is a polynomial: r itself (LMS), ln r (DEIS), or the number of the step (iPNDM, also known as PLMS). C_j is
the integral over the step, in r, of the j-th Lagrange polynomial. From pure noise (r infinite) a step is of order 1.
All start with lower orders, which leaves an error of h^2 from the first step.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.noise import Noise
from ldm.samplers.base import BySettings, Memory, Sampler, mix, noise_ratio


class _Slope(NamedTuple):
    eps: Tensor
    ratio: float


class Adams(Sampler):
    """The common step; a member says how much each earlier eps weighs. Raises ValueError on an order it has no rule
    for."""

    calls: ClassVar[int] = 1
    rises: ClassVar[bool] = True
    solver_order: int

    def __post_init__(self) -> None:
        if self.solver_order not in (1, 2, 3, 4):
            raise ValueError(f"{self.kind} solver_order must be 1, 2, 3 or 4, got {self.solver_order}")

    @BySettings
    def order(self) -> int:
        return min(self.solver_order, 2)

    @abstractmethod
    def weights(self, ratios: list[float], end: float) -> list[float]:
        """C_j of the earlier eps, ratios being sigma / alpha at this step's start and, newest first, theirs."""

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: tuple[_Slope, ...] | None,
             noise: Noise) -> tuple[Tensor, Memory]:
        ends, level = denoise(x, t), denoise.schedule(s)
        ratio, end = (noise_ratio(denoise.schedule, time) for time in (t, s))
        x, past = mix(level, ends), memory or ()
        if math.isinf(ratio) or math.isinf(end):
            return x, None
        for weight, older in zip(self.weights([ratio, *(old.ratio for old in past)], end), past, strict=True):
            x = x + (level.alpha * weight) * (older.eps - ends.eps)
        return x, (_Slope(ends.eps, ratio), *past)[: self.solver_order - 1]


@lru_cache(maxsize=1)
def _gauss() -> tuple[Tensor, Tensor]:
    """Nodes and weights of the 16-point Gauss-Legendre rule on [-1, 1], from its Jacobi matrix (Golub & Welsch
    1969)."""
    k = torch.arange(1, 16, dtype=torch.float64)
    beside = torch.diag(k / (4 * k**2 - 1).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(beside + beside.T)
    return nodes, 2 * vectors[0] ** 2


def lagrange(knots: list[float], at: Tensor) -> list[Tensor]:
    """The Lagrange polynomials of `knots` but the first, at the points `at`."""
    one = torch.ones_like(at)
    return [math.prod(((at - other) / (knot - other) for other in knots[:j] + knots[j + 1 :]), start=one)
            for j, knot in enumerate(knots) if j]


@dataclass(frozen=True, kw_only=True)
class LMS(Adams):
    """eps a polynomial in sigma / alpha. The linear multistep sampler of k-diffusion (Karras et al. 2022, appendix)."""

    kind: Literal["lms"] = "lms"
    solver_order: int = 4

    def weights(self, ratios: list[float], end: float) -> list[float]:
        nodes, weights = _gauss()
        half = (end - ratios[0]) / 2
        return [(half * weights @ values).item() for values in lagrange(ratios, ratios[0] + half * (1 + nodes))]


@dataclass(frozen=True, kw_only=True)
class DEIS(Adams):
    """eps a polynomial in ln(sigma / alpha); of order 1 onto t = 0. Zhang & Chen 2022 (arXiv 2204.13902), rho-AB in
    log."""

    kind: Literal["deis"] = "deis"
    solver_order: int = 3

    def weights(self, ratios: list[float], end: float) -> list[float]:
        if end == 0:
            return [0.0] * (len(ratios) - 1)
        nodes, weights = _gauss()
        logs = [math.log(ratio) for ratio in ratios]
        half = (math.log(end) - logs[0]) / 2
        at = logs[0] + half * (1 + nodes)
        return [(half * weights @ (at.exp() * values)).item() for values in lagrange(logs, at)]


@dataclass(frozen=True, kw_only=True)
class IPNDM(Adams):
    """eps a polynomial in the number of the step: the fixed Adams-Bashforth weights. Order 1 on grids uneven in
    sigma / alpha. Zhang & Chen 2022 (arXiv 2204.13902), appendix; PLMS is the same after its warm-up (Liu et al. 2022,
    arXiv 2202.09778)."""

    order: ClassVar[int] = 1
    kind: Literal["ipndm"] = "ipndm"
    solver_order: int = 4

    def weights(self, ratios: list[float], end: float) -> list[float]:
        fixed = {1: (), 2: (-1 / 2,), 3: (-16 / 12, 5 / 12), 4: (-59 / 24, 37 / 24, -9 / 24)}[len(ratios)]
        return [(end - ratios[0]) * weight for weight in fixed]


@dataclass(frozen=True, kw_only=True)
class PNDM(Sampler):
    """`ipndm` after a first step by Heun's rule in sigma / alpha, which costs one call more: Stable Diffusion's PLMS.

    Liu et al. 2022 (arXiv 2202.09778), section 3.5, with the start of latent diffusion's released code.
    """

    order: ClassVar[int] = 1
    calls: ClassVar[int] = 1
    rises: ClassVar[bool] = True
    kind: Literal["pndm"] = "pndm"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: tuple[_Slope, ...] | None,
             noise: Noise) -> tuple[Tensor, Memory]:
        if memory is not None:
            return IPNDM().step(denoise, x, t, s, memory, noise)
        ends, level = denoise(x, t), denoise.schedule(s)
        ratio, end = (noise_ratio(denoise.schedule, time) for time in (t, s))
        x = mix(level, ends)
        if s < denoise.schedule.t_min or math.isinf(ratio) or math.isinf(end):
            return x, None
        x = x + (level.alpha * (end - ratio) / 2) * (denoise(x, s).eps - ends.eps)
        return x, (_Slope(ends.eps, ratio),)
