"""Multistep rules: each step remembers earlier answers of the network, and integrates the polynomial through them.

The ODE and the reverse SDE are linear in x but for one end of it, f, so that a step is the order-1 rule, which holds f
still, and the integral of what f changes by: x_s = (order 1) + c_s sum_j C_j (f_j - f) over earlier f_j, with
C_j = int k(w) L_j(w) dw over the step, L_j being the Lagrange polynomials of the places w_j. A `rate` names the form:

    rate   w                                 f    c      k(w)
    1      lambda = ln(alpha / sigma)        x0   alpha  e^-(w_s - w)        DPM-Solver++ (Lu et al. 2022, 2211.01095)
    2      lambda                            x0   alpha  2 e^-2(w_s - w)     the same on the reverse SDE
    -1     lambda                            eps  sigma  -e^(w_s - w)        DEIS (Zhang & Chen 2022, 2204.13902)
    0      sigma / alpha                     eps  alpha  1                   LMS, and PLMS in the number of the step

Where w has no end, from pure noise and in lambda onto t = 0, a step is of order 1 and nothing is remembered. All start
with lower orders, which leaves an error of h^2 from the first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.noise import Noise
from ldm.samplers.ancestral import posterior
from ldm.samplers.base import Memory, Sampler, Step, half_logsnr, mix, noise_ratio


class Past(NamedTuple):
    """An earlier estimate of f, and the place w it was made at, float64 ()."""

    value: Tensor
    place: Tensor


@lru_cache(maxsize=1)
def _gauss() -> tuple[Tensor, Tensor]:
    """Nodes and weights of the 32-point Gauss-Legendre rule on [0, 1], from its Jacobi matrix (Golub & Welsch 1969)."""
    k = torch.arange(1, 32, dtype=torch.float64)
    beside = torch.diag(k / (4 * k**2 - 1).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(beside + beside.T)
    return (1 + nodes) / 2, vectors[0] ** 2


def integrals(places: Sequence[Tensor], end: Tensor, rate: int) -> list[Tensor]:
    """C_j of all places but the first, where the step to `end` starts: of the polynomial through them, to rounding."""
    nodes, weights = _gauss()
    width = end - places[0]
    at = places[0] + width * nodes
    kernel = weights * width * (rate * (-rate * (end - at)).exp() if rate else 1)
    return [kernel @ math.prod(((at - other) / (place - other) for k, other in enumerate(places) if k != j),
                               start=torch.ones_like(at))
            for j, place in enumerate(places) if j]


def middle(places: Sequence[Tensor], end: Tensor, rate: int) -> list[Tensor]:
    """As `integrals` of one earlier place, but with the line through the two taken at the middle of the step."""
    h = end - places[0]
    return [-(-rate * h).expm1() * h / (2 * (place - places[0])) for place in places[1:]]


def counted(places: Sequence[Tensor], end: Tensor, rate: int) -> list[Tensor]:
    """C_j of a polynomial in the number of the step: the fixed Adams-Bashforth weights."""
    fixed = {1: (), 2: (-1 / 2,), 3: (-16 / 12, 5 / 12), 4: (-59 / 24, 37 / 24, -9 / 24)}[len(places)]
    return [(end - places[0]) * weight for weight in fixed]


def bent(x: Tensor, scale: Tensor, weights: Sequence[Tensor], now: Past, past: Sequence[Past]) -> Tensor:
    """x + scale sum_j weight_j (f_j - f)."""
    for weight, old in zip(weights, past, strict=True):
        x = x + (scale * weight) * (old.value - now.value)
    return x


class Multistep(Sampler):
    """The common step, one call each; `rule` gives the weights C_j of the earlier estimates, newest first.

    Raises ValueError on a `solver_order`, the number of estimates, that it has no rule for.
    """

    solver_order: int
    rate = 1
    rule = staticmethod(integrals)
    rises = True
    limits: ClassVar = {"solver_order": "[1, 4]"}

    @property
    def order(self) -> int:
        return min(self.solver_order, 2)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        ends, level, place = denoise(x, t), denoise.schedule(s), half_logsnr if self.rate else noise_ratio
        start, end = place(denoise.schedule, t), place(denoise.schedule, s)
        x = mix(level, ends)
        if self.rate == 2 and s > 0:
            x = posterior(level, ends, end - start, noise.normal(x.shape[1:], dtype=x.dtype))
        if not bool((end - start).isfinite()):
            return x, None
        now, past = Past(ends.x0 if self.rate > 0 else ends.eps, start), memory or ()
        weights = self.rule([start, *(old.place for old in past)], end, self.rate)
        x = bent(x, level.sigma if self.rate < 0 else level.alpha, weights, now, past)
        return x, (now, *past)[: self.solver_order - 1]


@dataclass(frozen=True, kw_only=True)
class DPMpp2M(Multistep):
    """DPM-Solver++(2M): order 2 from two estimates, one call a step.

    x_s = (sigma_s / sigma_t) x - alpha_s expm1(-h) ((1 + 1/2r) D - 1/2r D_prev), r = h_prev / h. First and last step of
    order 1. Lu et al. 2022 (arXiv 2211.01095), algorithm 2.
    """

    solver_order = 2
    rule = staticmethod(middle)
    kind: Literal["dpmpp-2m"] = "dpmpp-2m"


@dataclass(frozen=True, kw_only=True)
class DPMpp3M(Multistep):
    """DPM-Solver++(3M): the parabola through three estimates of x0, integrated exactly. One call a step.

    Each step errs by h^4, but the first two, of lower order, leave an error of h^2 from the start. The released code
    of the paper and its copies halve the quadratic term, since their D2 is half the second derivative that phi_3
    multiplies; that costs an order, so this rule is not theirs. Lu et al. 2022 (arXiv 2211.01095), eq. 10.
    """

    solver_order = 3
    kind: Literal["dpmpp-3m"] = "dpmpp-3m"


class OnSDE(Multistep):
    """The same on the reverse SDE, whose order-1 step is `ddpm`'s."""

    order = 1
    rate = 2
    rises = False


@dataclass(frozen=True, kw_only=True)
class DPMppSDE2M(OnSDE):
    """SDE-DPM-Solver++(2M): as `dpmpp-2m` on the reverse SDE. One call a step; its first step is `ddpm`'s.

    x_s = alpha_s x0 + sigma_s e^-h eps + alpha_s (1 - e^-2h) (D - D_prev) / 2r + sigma_s sqrt(1 - e^-2h) z.
    Lu et al. 2022 (arXiv 2211.01095), appendix; the midpoint form of its released code.
    """

    solver_order = 2
    rule = staticmethod(middle)
    kind: Literal["dpmpp-sde-2m"] = "dpmpp-sde-2m"


@dataclass(frozen=True, kw_only=True)
class DPMppSDE3M(OnSDE):
    """SDE-DPM-Solver++(3M): as `dpmpp-3m` on the reverse SDE, its parabola integrated exactly. One call a step.

    The released sampler of k-diffusion halves the quadratic term, for the reason given at `dpmpp-3m`.
    """

    solver_order = 3
    kind: Literal["dpmpp-sde-3m"] = "dpmpp-sde-3m"


@dataclass(frozen=True, kw_only=True)
class DEIS(Multistep):
    """eps a polynomial in ln(sigma / alpha); of order 1 onto t = 0. Zhang & Chen 2022 (arXiv 2204.13902), rho-AB in
    log."""

    rate = -1
    kind: Literal["deis"] = "deis"
    solver_order: int = 3


@dataclass(frozen=True, kw_only=True)
class LMS(Multistep):
    """eps a polynomial in sigma / alpha. The linear multistep sampler of k-diffusion (Karras et al. 2022, appendix)."""

    rate = 0
    kind: Literal["lms"] = "lms"
    solver_order: int = 4


@dataclass(frozen=True, kw_only=True)
class IPNDM(Multistep):
    """eps a polynomial in the number of the step: the fixed Adams-Bashforth weights. Order 1 on grids uneven in
    sigma / alpha. Zhang & Chen 2022 (arXiv 2204.13902), appendix; PLMS is the same after its warm-up (Liu et al. 2022,
    arXiv 2202.09778)."""

    order = 1
    rate = 0
    rule = staticmethod(counted)
    kind: Literal["ipndm"] = "ipndm"
    solver_order: int = 4


@dataclass(frozen=True, kw_only=True)
class PNDM(Sampler):
    """`ipndm` after a first step by Heun's rule in sigma / alpha, which costs one call more: Stable Diffusion's PLMS.

    Liu et al. 2022 (arXiv 2202.09778), section 3.5, with the start of latent diffusion's released code.
    """

    rises = True
    kind: Literal["pndm"] = "pndm"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        moved, after = IPNDM().step(denoise, x, t, s, memory, noise)
        if memory is not None or after is None or s < denoise.schedule.t_min:
            return moved, after
        start, end = noise_ratio(denoise.schedule, t), noise_ratio(denoise.schedule, s)
        ahead = Past(denoise(moved, s).eps, end)
        return bent(moved, denoise.schedule(s).alpha, [(end - start) / 2], after[0], [ahead]), after


@dataclass(frozen=True, kw_only=True)
class UniPC(Sampler):
    """UniP of `solver_order` p, then UniC of the same p unless `corrector` is off, with B(h) = e^h - 1 ("bh2").

    x_s = (sigma_s / sigma_t) x - alpha_s expm1(-h) (D + sum_i rho_i (D_i - D) / r_i), r_i = (lambda_i - lambda_t) / h;
    the corrector adds the estimate at s to the sum, with r = 1. Its rho make the sum the integral of the polynomial
    through the estimates, but for one half where there is one r. One call a step (and one more where the grid ends
    above t_min): the corrected x keeps the estimate made at the predicted one. Order p, or p + 1 corrected; the early
    steps are of lower order. UniP-1 is DDIM, UniP-2 is `dpmpp-2m`. Zhao et al. 2023 (arXiv 2302.04867), algorithms 5
    and 6.
    """

    rises = True
    limits: ClassVar = {"solver_order": "[1, 3]"}
    kind: Literal["unipc"] = "unipc"
    solver_order: int = 2
    corrector: bool = True

    @property
    def order(self) -> int:
        # What may be relied on: how far the first steps, of lower order, hold the rest back depends on the grid.
        return min(self.solver_order + self.corrector, 2)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        schedule, start, end = denoise.schedule, half_logsnr(denoise.schedule, t), half_logsnr(denoise.schedule, s)
        past, level = memory or (Past(denoise(x, t).x0, start),), schedule(s)
        base = (level.sigma / schedule(t).sigma) * x - (level.alpha * (start - end).expm1()) * past[0].value
        if not bool((end - start).isfinite()):
            # Over an infinite end the rule is of order 1, and an estimate at that end is worth no difference.
            return base, self._next(denoise, base, s, ())
        predicted = self._bent(base, level.alpha, past, end)
        estimates = self._next(denoise, predicted, s, past)
        if estimates is None or not self.corrector:
            return predicted, estimates
        return self._bent(base, level.alpha, (*past, estimates[0]), end), estimates

    def _bent(self, x: Tensor, scale: Tensor, past: tuple[Past, ...], end: Tensor) -> Tensor:
        rule = middle if len(past) == 2 else integrals
        return bent(x, scale, rule([old.place for old in past], end, 1), past[0], past[1:])

    def _next(self, denoise: Denoise, x: Tensor, s: Tensor, past: tuple[Past, ...]) -> tuple[Past, ...] | None:
        """The estimates of x0 at s and before it, newest first; None where the network may not be called."""
        if s < denoise.schedule.t_min:
            return None
        return Past(denoise(x, s).x0, half_logsnr(denoise.schedule, s)), *past[: self.solver_order - 1]


SAMPLERS = (DPMpp2M, DPMpp3M, DPMppSDE2M, DPMppSDE3M, DEIS, LMS, IPNDM, PNDM, UniPC)
