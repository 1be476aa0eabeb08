"""Exponential integrators in half the log-SNR (DPM-Solver++): exact in the linear part, polynomial in x0 or in eps.

With lambda = logsnr / 2 and h its growth over a step, the order-1 step is DDIM's, alpha_s x0 + sigma_s eps, and higher
orders add weighted differences of x0 or of eps. The weights vanish or are dropped where h is infinite, that is on the
step from pure noise and the one onto t = 0. Lu et al. 2022 (arXiv 2211.01095).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from ldm.denoiser import Denoise
from ldm.diffusion import Denoised
from ldm.noise import Noise
from ldm.samplers.base import Memory, Sampler, mix
from ldm.schedules import Level


class Past(NamedTuple):
    """An earlier estimate of x0 and the half log-SNR it was made at."""

    x0: Tensor
    lam: Tensor


def half_logsnr(denoise: Denoise, t: Tensor) -> Tensor:
    """lambda = ln(alpha / sigma)."""
    return denoise.schedule.logsnr(t) / 2


def diffused(level: Level, ends: Denoised, h: Tensor, z: Tensor) -> Tensor:
    """The order-1 step of length h of the reverse SDE, which is `ddpm`'s, onto a level by the draw z."""
    x = level.alpha * ends.x0 + (level.sigma * (-h).exp()) * ends.eps
    return x + (level.sigma * (-(-2 * h).expm1()).sqrt()) * z


class Multistep(Sampler):
    """The common step of the rules that bend with earlier estimates of x0, one call each.

    `rate` is 1 on the ODE and 2 on the reverse SDE: the weight of x0 falls as e^(-rate u) back from the step's end.
    """

    calls: ClassVar[int] = 1
    rate: ClassVar[int]
    remembered: ClassVar[int]

    @abstractmethod
    def bend(self, scale: Tensor, now: Past, past: tuple[Past, ...], h: Tensor) -> Tensor:
        """`scale` times what the estimates of the `past` (newest first) add to the step of length h."""

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: tuple[Past, ...] | None,
             noise: Noise) -> tuple[Tensor, Memory]:
        ends, level = denoise(x, t), denoise.schedule(s)
        if s == 0:
            return ends.x0, None
        now, past = Past(ends.x0, half_logsnr(denoise, t)), memory or ()
        h = half_logsnr(denoise, s) - now.lam
        if self.rate == 1:
            x = mix(level, ends)
        else:
            x = diffused(level, ends, h, noise.normal(x.shape[1:], dtype=x.dtype))
        if past and bool(h.isfinite()):
            x = x + self.bend(level.alpha, now, past, h)
        return x, (now, *past)[: self.remembered]


class Line(Multistep):
    """A line through two estimates, its slope taken at the middle of the step."""

    remembered: ClassVar[int] = 1

    def bend(self, scale: Tensor, now: Past, past: tuple[Past, ...], h: Tensor) -> Tensor:
        weight = -(-self.rate * h).expm1() * h / (2 * (now.lam - past[0].lam))
        return (scale * weight) * (now.x0 - past[0].x0)


class Parabola(Multistep):
    """The parabola through three estimates, at first the line through two, integrated exactly."""

    remembered: ClassVar[int] = 2

    def bend(self, scale: Tensor, now: Past, past: tuple[Past, ...], h: Tensor) -> Tensor:
        linear, gap = h + (-self.rate * h).expm1() / self.rate, now.lam - past[0].lam
        slope = (now.x0 - past[0].x0) / gap
        bent = (scale * linear) * slope
        if len(past) < 2:
            return bent
        older = (past[0].x0 - past[1].x0) / (past[0].lam - past[1].lam)
        quadratic = h**2 - 2 * linear / self.rate
        return bent + (scale * (quadratic + gap * linear) / (now.lam - past[1].lam)) * (slope - older)


@dataclass(frozen=True, kw_only=True)
class DPMpp2M(Line):
    """DPM-Solver++(2M): order 2 from two estimates, one call a step.

    x_s = (sigma_s / sigma_t) x - alpha_s expm1(-h) ((1 + 1/2r) D - 1/2r D_prev), r = h_prev / h. First and last step of
    order 1. Lu et al. 2022 (arXiv 2211.01095), algorithm 2.
    """

    order: ClassVar[int] = 2
    rate: ClassVar[int] = 1
    rises: ClassVar[bool] = True
    kind: Literal["dpmpp-2m"] = "dpmpp-2m"


@dataclass(frozen=True, kw_only=True)
class DPMpp3M(Parabola):
    """DPM-Solver++(3M): the parabola through three estimates of x0, integrated exactly. One call a step.

    Each step errs by h^4, but the first two, of lower order, leave an error of h^2 from the start. The released code
    of the paper and its copies halve the quadratic term, since their D2 is half the second derivative that phi_3
    multiplies; that costs an order, so this rule is not theirs. Lu et al. 2022 (arXiv 2211.01095), eq. 10.
    """

    order: ClassVar[int] = 2
    rate: ClassVar[int] = 1
    rises: ClassVar[bool] = True
    kind: Literal["dpmpp-3m"] = "dpmpp-3m"


@dataclass(frozen=True, kw_only=True)
class DPMppSDE2M(Line):
    """SDE-DPM-Solver++(2M): as `dpmpp-2m` on the reverse SDE. One call a step; its first step is `ddpm`'s.

    x_s = alpha_s x0 + sigma_s e^-h eps + alpha_s (1 - e^-2h) (D - D_prev) / 2r + sigma_s sqrt(1 - e^-2h) z.
    Lu et al. 2022 (arXiv 2211.01095), appendix; the midpoint form of its released code.
    """

    order: ClassVar[int] = 1
    rate: ClassVar[int] = 2
    kind: Literal["dpmpp-sde-2m"] = "dpmpp-sde-2m"


@dataclass(frozen=True, kw_only=True)
class DPMppSDE3M(Parabola):
    """SDE-DPM-Solver++(3M): as `dpmpp-3m` on the reverse SDE, its parabola integrated exactly. One call a step.

    The released sampler of k-diffusion halves the quadratic term, for the reason given at `dpmpp-3m`.
    """

    order: ClassVar[int] = 1
    rate: ClassVar[int] = 2
    kind: Literal["dpmpp-sde-3m"] = "dpmpp-sde-3m"


@dataclass(frozen=True, kw_only=True)
class DPMppSDE2S(Sampler):
    """SDE-DPM-Solver++(2S): `ddpm`'s step by the x0 at the middle of the step in lambda, where another one leads. Order
    2 in the moments, two calls a step; the step from pure noise and the one onto t = 0 are `ddpm`'s own.

    x_s = alpha_s x0 + sigma_s e^-h eps + alpha_s (1 - e^-2h) (D_middle - x0) + sigma_s sqrt(1 - e^-2h) z. The noise of
    both is one path: z = (e^(-h/2) z_1 + z_2) / sqrt(1 + e^-h). Lu et al. 2022 (arXiv 2211.01095) for the SDE; this
    rule is k-diffusion's dpmpp_sde at r = 1/2, but for its path, which is Brownian in sigma / alpha.
    """

    order: ClassVar[int] = 2
    calls: ClassVar[int] = 2
    kind: Literal["dpmpp-sde-2s"] = "dpmpp-sde-2s"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory,
             noise: Noise) -> tuple[Tensor, Memory]:
        schedule, ends = denoise.schedule, denoise(x, t)
        if s == 0:
            return ends.x0, None
        level, lam = schedule(s), half_logsnr(denoise, t)
        h, first = half_logsnr(denoise, s) - lam, noise.normal(x.shape[1:], 0, dtype=x.dtype)
        if not bool(h.isfinite()):
            return diffused(level, ends, h, first), None
        time = schedule.time(2 * lam + h)
        middle = denoise(diffused(schedule(time), ends, h / 2, first), time)
        z = (-h / 2).exp() * first + noise.normal(x.shape[1:], 1, dtype=x.dtype)
        x = diffused(level, ends, h, z / (1 + (-h).exp()).sqrt())
        return x - (level.alpha * (-2 * h).expm1()) * (middle.x0 - ends.x0), None


class Singlestep(Sampler):
    """What the rules share that call the network inside the step, at equal parts of it in lambda.

    `polynomial` names the end of x_t whose differences they integrate, x0 (DPM-Solver++) or eps (DPM-Solver): with the
    coefficient c of that end and u = -h for x0, h for eps, both are the same rule.
    """

    rises: ClassVar[bool] = True
    polynomial: ClassVar[Literal["x0", "eps"]]

    def span(self, level: Level, h: Tensor) -> tuple[Tensor, Tensor]:
        """(c, u) of a stretch of length h that ends at a level."""
        return (level.alpha, -h) if self.polynomial == "x0" else (level.sigma, h)

    def change(self, ends: Denoised, first: Denoised) -> Tensor:
        """How far a later estimate of that end is from the first."""
        return ends.x0 - first.x0 if self.polynomial == "x0" else ends.eps - first.eps


class SinglestepTwo(Singlestep):
    """x_s = alpha_s x0 + sigma_s eps - c expm1(u) (change at the middle)."""

    order: ClassVar[int] = 2
    calls: ClassVar[int] = 2

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory,
             noise: Noise) -> tuple[Tensor, Memory]:
        schedule, ends = denoise.schedule, denoise(x, t)
        level, lam = schedule(s), half_logsnr(denoise, t)
        h = half_logsnr(denoise, s) - lam
        x = mix(level, ends)
        if bool(h.isfinite()):
            time = schedule.time(2 * lam + h)
            middle = denoise(mix(schedule(time), ends), time)
            c, u = self.span(level, h)
            x = x - (c * u.expm1()) * self.change(middle, ends)
        return x, None


class SinglestepThree(Singlestep):
    """x_s = alpha_s x0 + sigma_s eps + 3/2 c (1 - expm1(u) / u) (change at two thirds, which needs that at one)."""

    order: ClassVar[int] = 3
    calls: ClassVar[int] = 3

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory,
             noise: Noise) -> tuple[Tensor, Memory]:
        schedule, ends = denoise.schedule, denoise(x, t)
        level, lam = schedule(s), half_logsnr(denoise, t)
        h = half_logsnr(denoise, s) - lam
        if not bool(h.isfinite()):
            return mix(level, ends), None
        third, beyond = schedule.time(2 * (lam + h / 3)), schedule.time(2 * (lam + 2 * h / 3))
        change = self.change(denoise(mix(schedule(third), ends), third), ends)
        near = schedule(beyond)
        inner = mix(near, ends) + (2 * self._slope(near, 2 * h / 3)) * change
        change = self.change(denoise(inner, beyond), ends)
        return mix(level, ends) + (1.5 * self._slope(level, h)) * change, None

    def _slope(self, level: Level, h: Tensor) -> Tensor:
        c, u = self.span(level, h)
        return c * (1 - u.expm1() / u)


@dataclass(frozen=True, kw_only=True)
class DPMpp2S(SinglestepTwo):
    """DPM-Solver++(2S): the slope of x0 at the middle of the step in lambda. Order 2, two calls a step.

    Lu et al. 2022 (arXiv 2211.01095), algorithm 1 with r = 1/2.
    """

    polynomial: ClassVar[Literal["x0", "eps"]] = "x0"
    kind: Literal["dpmpp-2s"] = "dpmpp-2s"


@dataclass(frozen=True, kw_only=True)
class DPMSolver2(SinglestepTwo):
    """DPM-Solver-2, as `dpmpp-2s` in eps. Order 2, two calls a step. Lu et al. 2022 (arXiv 2206.00927), algorithm 1."""

    polynomial: ClassVar[Literal["x0", "eps"]] = "eps"
    kind: Literal["dpm-solver-2"] = "dpm-solver-2"


@dataclass(frozen=True, kw_only=True)
class DPMpp3S(SinglestepThree):
    """DPM-Solver++(3S): estimates of x0 at one and two thirds of the step in lambda. Order 3, three calls a step.

    Lu et al. 2022 (arXiv 2206.00927), algorithm 2, in x0.
    """

    polynomial: ClassVar[Literal["x0", "eps"]] = "x0"
    kind: Literal["dpmpp-3s"] = "dpmpp-3s"


@dataclass(frozen=True, kw_only=True)
class DPMSolver3(SinglestepThree):
    """DPM-Solver-3, as `dpmpp-3s` in eps. Order 3, three calls a step. Lu et al. 2022 (arXiv 2206.00927), algorithm 2.
    """

    polynomial: ClassVar[Literal["x0", "eps"]] = "eps"
    kind: Literal["dpm-solver-3"] = "dpm-solver-3"
