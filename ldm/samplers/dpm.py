"""Exponential integrators in half the log-SNR (DPM-Solver++): exact in the linear part, polynomial in x0.

With lambda = logsnr / 2 and h its growth over a step, the order-1 step is DDIM's, alpha_s x0 + sigma_s eps, and higher
orders add alpha_s times weighted differences of x0. The weights vanish or are dropped where h is infinite, that is on
the step from pure noise and the one onto t = 0. Lu et al. 2022 (arXiv 2211.01095).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from ldm.denoiser import Denoise
from ldm.noise import Noise
from ldm.samplers.base import Memory, Sampler, mix


class Past(NamedTuple):
    """An earlier estimate of x0 and the half log-SNR it was made at."""

    x0: Tensor
    lam: Tensor


def half_logsnr(denoise: Denoise, t: Tensor) -> Tensor:
    """lambda = ln(alpha / sigma)."""
    return denoise.schedule.logsnr(t) / 2


@dataclass(frozen=True, kw_only=True)
class DPMpp2M(Sampler):
    """DPM-Solver++(2M): order 2 from two estimates, one call a step.

    x_s = (sigma_s / sigma_t) x - alpha_s expm1(-h) ((1 + 1/2r) D - 1/2r D_prev), r = h_prev / h. First and last step of
    order 1. Lu et al. 2022 (arXiv 2211.01095), algorithm 2.
    """

    order: ClassVar[int] = 2
    calls: ClassVar[int] = 1
    kind: Literal["dpmpp-2m"] = "dpmpp-2m"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Past | None,
             noise: Noise) -> tuple[Tensor, Memory]:
        ends, level = denoise(x, t), denoise.schedule(s)
        lam, lam_s = half_logsnr(denoise, t), half_logsnr(denoise, s)
        x, h = mix(level, ends), lam_s - lam
        if memory is not None and bool(h.isfinite()):
            weight = -level.alpha * (-h).expm1() * h / (2 * (lam - memory.lam))
            x = x + weight * (ends.x0 - memory.x0)
        return x, Past(ends.x0, lam)


@dataclass(frozen=True, kw_only=True)
class DPMpp3M(Sampler):
    """DPM-Solver++(3M): the parabola through three estimates of x0, integrated exactly. One call a step.

    Each step errs by h^4, but the first two, of lower order, leave an error of h^2 from the start. The released code
    of the paper and its copies halve the quadratic term, since their D2 is half the second derivative that phi_3
    multiplies; that costs an order, so this rule is not theirs. Lu et al. 2022 (arXiv 2211.01095), eq. 10.
    """

    order: ClassVar[int] = 2
    calls: ClassVar[int] = 1
    kind: Literal["dpmpp-3m"] = "dpmpp-3m"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: tuple[Past, ...] | None,
             noise: Noise) -> tuple[Tensor, Memory]:
        ends, level = denoise(x, t), denoise.schedule(s)
        lam, past = half_logsnr(denoise, t), memory or ()
        x, h = mix(level, ends), half_logsnr(denoise, s) - lam
        if past and bool(h.isfinite()):
            linear = h + (-h).expm1()
            gap = lam - past[0].lam
            first = (ends.x0 - past[0].x0) / gap
            x = x + level.alpha * linear * first
            if len(past) == 2:
                older = (past[0].x0 - past[1].x0) / (past[0].lam - past[1].lam)
                quadratic = h**2 - 2 * linear
                x = x + (level.alpha * (quadratic + gap * linear) / (lam - past[1].lam)) * (first - older)
        return x, (Past(ends.x0, lam), *past[:1])


@dataclass(frozen=True, kw_only=True)
class DPMpp2S(Sampler):
    """DPM-Solver++(2S): the slope at the middle of the step in lambda. Order 2, two calls a step.

    Lu et al. 2022 (arXiv 2211.01095), algorithm 1 with r = 1/2.
    """

    order: ClassVar[int] = 2
    calls: ClassVar[int] = 2
    kind: Literal["dpmpp-2s"] = "dpmpp-2s"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory,
             noise: Noise) -> tuple[Tensor, Memory]:
        ends, level = denoise(x, t), denoise.schedule(s)
        lam = half_logsnr(denoise, t)
        h = half_logsnr(denoise, s) - lam
        x = mix(level, ends)
        if bool(h.isfinite()):
            time = denoise.schedule.time(2 * lam + h)
            middle = denoise(mix(denoise.schedule(time), ends), time)
            x = x - (level.alpha * (-h).expm1()) * (middle.x0 - ends.x0)
        return x, None


@dataclass(frozen=True, kw_only=True)
class DPMpp3S(Sampler):
    """DPM-Solver++(3S): estimates at one and two thirds of the step in lambda. Order 3, three calls a step.

    Lu et al. 2022 (arXiv 2206.00927), algorithm 2, in x0.
    """

    order: ClassVar[int] = 3
    calls: ClassVar[int] = 3
    kind: Literal["dpmpp-3s"] = "dpmpp-3s"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory,
             noise: Noise) -> tuple[Tensor, Memory]:
        schedule, ends = denoise.schedule, denoise(x, t)
        lam = half_logsnr(denoise, t)
        h = half_logsnr(denoise, s) - lam
        x = mix(schedule(s), ends)
        if not bool(h.isfinite()):
            return x, None
        time = schedule.time(2 * (lam + h / 3))
        slope = 3 * (denoise(mix(schedule(time), ends), time).x0 - ends.x0)
        part, time = 2 * h / 3, schedule.time(2 * (lam + 2 * h / 3))
        level = schedule(time)
        inner = mix(level, ends) + (level.alpha * (1 + (-part).expm1() / part) * 2 / 3) * slope
        slope = 1.5 * (denoise(inner, time).x0 - ends.x0)
        return x + (schedule(s).alpha * (1 + (-h).expm1() / h)) * slope, None


@dataclass(frozen=True, kw_only=True)
class DPMppSDE2M(Sampler):
    """SDE-DPM-Solver++(2M): as `dpmpp-2m` on the reverse SDE. One call a step; its first step is `ddpm`'s.

    x_s = alpha_s x0 + sigma_s e^-h eps + alpha_s (1 - e^-2h) (D - D_prev) / 2r + sigma_s sqrt(1 - e^-2h) z.
    Lu et al. 2022 (arXiv 2211.01095), appendix; the midpoint form of its released code.
    """

    order: ClassVar[int] = 1
    calls: ClassVar[int] = 1
    kind: Literal["dpmpp-sde-2m"] = "dpmpp-sde-2m"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Past | None,
             noise: Noise) -> tuple[Tensor, Memory]:
        ends, level = denoise(x, t), denoise.schedule(s)
        if s == 0:
            return ends.x0, None
        lam = half_logsnr(denoise, t)
        h = half_logsnr(denoise, s) - lam
        fresh = -(-2 * h).expm1()
        x = level.alpha * ends.x0 + (level.sigma * (-h).exp()) * ends.eps
        if memory is not None and bool(h.isfinite()):
            x = x + (level.alpha * fresh * h / (2 * (lam - memory.lam))) * (ends.x0 - memory.x0)
        return x + (level.sigma * fresh.sqrt()) * noise.normal(x.shape[1:], dtype=x.dtype), Past(ends.x0, lam)


@dataclass(frozen=True, kw_only=True)
class DPMppSDE3M(Sampler):
    """SDE-DPM-Solver++(3M): as `dpmpp-3m` on the reverse SDE, its parabola integrated exactly. One call a step.

    The released sampler of k-diffusion halves the quadratic term, for the reason given at `dpmpp-3m`.
    """

    order: ClassVar[int] = 1
    calls: ClassVar[int] = 1
    kind: Literal["dpmpp-sde-3m"] = "dpmpp-sde-3m"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: tuple[Past, ...] | None,
             noise: Noise) -> tuple[Tensor, Memory]:
        ends, level = denoise(x, t), denoise.schedule(s)
        if s == 0:
            return ends.x0, None
        lam, past = half_logsnr(denoise, t), memory or ()
        h = half_logsnr(denoise, s) - lam
        x = level.alpha * ends.x0 + (level.sigma * (-h).exp()) * ends.eps
        if past and bool(h.isfinite()):
            linear = h + (-2 * h).expm1() / 2
            gap = lam - past[0].lam
            first = (ends.x0 - past[0].x0) / gap
            x = x + level.alpha * linear * first
            if len(past) == 2:
                older = (past[0].x0 - past[1].x0) / (past[0].lam - past[1].lam)
                x = x + (level.alpha * (h**2 - linear + gap * linear) / (lam - past[1].lam)) * (first - older)
        fresh = (-(-2 * h).expm1()).sqrt()
        return x + (level.sigma * fresh) * noise.normal(x.shape[1:], dtype=x.dtype), (Past(ends.x0, lam), *past[:1])


@dataclass(frozen=True, kw_only=True)
class DPMSolver2(Sampler):
    """DPM-Solver-2, singlestep, in eps: x_s = alpha_s x0 + sigma_s eps - sigma_s (e^h - 1) (eps_mid - eps).

    Order 2, two calls a step. Lu et al. 2022 (arXiv 2206.00927), algorithm 1.
    """

    order: ClassVar[int] = 2
    calls: ClassVar[int] = 2
    kind: Literal["dpm-solver-2"] = "dpm-solver-2"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory,
             noise: Noise) -> tuple[Tensor, Memory]:
        schedule, ends = denoise.schedule, denoise(x, t)
        lam = half_logsnr(denoise, t)
        h = half_logsnr(denoise, s) - lam
        x = mix(schedule(s), ends)
        if bool(h.isfinite()):
            time = schedule.time(2 * lam + h)
            middle = denoise(mix(schedule(time), ends), time)
            x = x - (schedule(s).sigma * h.expm1()) * (middle.eps - ends.eps)
        return x, None


@dataclass(frozen=True, kw_only=True)
class DPMSolver3(Sampler):
    """DPM-Solver-3, singlestep, in eps at one and two thirds of the step. Order 3, three calls a step.

    Lu et al. 2022 (arXiv 2206.00927), algorithm 2.
    """

    order: ClassVar[int] = 3
    calls: ClassVar[int] = 3
    kind: Literal["dpm-solver-3"] = "dpm-solver-3"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory,
             noise: Noise) -> tuple[Tensor, Memory]:
        schedule, ends = denoise.schedule, denoise(x, t)
        lam = half_logsnr(denoise, t)
        h = half_logsnr(denoise, s) - lam
        x = mix(schedule(s), ends)
        if not bool(h.isfinite()):
            return x, None
        time = schedule.time(2 * (lam + h / 3))
        slope = denoise(mix(schedule(time), ends), time).eps - ends.eps
        part, time = 2 * h / 3, schedule.time(2 * (lam + 2 * h / 3))
        level = schedule(time)
        inner = mix(level, ends) - (2 * level.sigma * (part.expm1() / part - 1)) * slope
        slope = denoise(inner, time).eps - ends.eps
        return x - (1.5 * schedule(s).sigma * (h.expm1() / h - 1)) * slope, None
