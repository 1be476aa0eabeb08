"""Guidances: rules that make a condition count for more than a network gives it.

Any combination with weights that sum to one of pairs (x0, eps) that make up x_t makes up x_t too, whichever of x0, eps
or velocity it is written in; a guidance that does more names its space and completes the pair. A learned variance stays
the condition's own. A new guidance is a class and an entry in `GUIDANCES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Bound, Conditional, Denoise
from ldm.diffusion import Denoised, dot
from ldm.guiding import ALONE, AgainstNull, Guidance, Helpers, Scaled, place
from ldm.jumps import SCALE, beside
from ldm.schedules import Level, match


def _extrapolated(told: Denoised, absent: Denoised, scale: float) -> Denoised:
    """absent + scale (told - absent), in both ends."""
    return told._replace(x0=torch.lerp(absent.x0, told.x0, scale), eps=torch.lerp(absent.eps, told.eps, scale))


@dataclass(frozen=True, kw_only=True)
class ClassifierFree(AgainstNull):
    """uncond + scale (cond - uncond), on noise shares in `interval`; the plain condition elsewhere.

    The share of noise is sigma / (alpha + sigma), on every process the time of `flow`: 0.2 to 0.8 is sigma / alpha 1/4
    to 4. `interval_in` "t" means times of the schedule itself, as runs of old do.

    Scale 1 never calls without the condition, scale 0 never with it. `rescale` in [0, 1] moves the standard deviation
    of the guided x0, per sample, back to the conditional one's. Ho & Salimans 2022 (arXiv 2207.12598), eq. 6; interval:
    Kynkaanniemi et al. 2024 (arXiv 2404.07724); rescale: Lin et al. 2023 (arXiv 2305.08891), eq. 15 and 16, in x0.
    """

    kind: Literal["classifier-free"] = "classifier-free"
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    interval_in: Literal["noise-share", "t"] = "noise-share"
    limits: ClassVar = {**AgainstNull.limits, "rescale": "[0, 1]"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"guidance interval must be two numbers 0 <= low <= high <= 1, got {self.interval}")

    def spared(self, x: Tensor, t: Tensor, denoiser: Conditional, cond: Cond, null: Cond) -> Denoised | None:
        if not self.interval[0] <= place(t, denoiser.schedule, self.interval_in) <= self.interval[1]:
            return denoiser(x, t, cond)
        return denoiser(x, t, null) if self.scale == 0 else None

    def mix(self, told: Denoised, absent: Denoised, x: Tensor, level: Level) -> Denoised:
        guided = _extrapolated(told, absent, self.scale)
        return rescaled(guided, told, self.rescale) if self.rescale else guided


def rescaled(guided: Denoised, told: Denoised, share: float) -> Denoised:
    """x0 moved by `share` to the standard deviation of told's, per sample, and the eps that keeps x_t what it is.

    With r = std told / std guided, x0 becomes (1 + share (r - 1)) x0 and eps grows by share alpha (1 - r) / sigma x0.
    That factor is written by a covariance with alpha (guided - told) / sigma in x0, which is told - guided in eps, and
    so without a division by sigma: where that is 0, r is 1, and the factor is finite.
    """
    wanted, std, total = per_sample_std(told.x0), per_sample_std(guided.x0), told.x0 + guided.x0
    off = total - total.mean(dim=tuple(range(1, total.ndim)), keepdim=True)
    factor = dot(told.eps - guided.eps, off) / (off[0].numel() - 1) / (std * (std + wanted))
    x0 = guided.x0 * (1 + share * (wanted / std - 1))
    return guided._replace(x0=x0, eps=guided.eps + share * factor * guided.x0)


def per_sample_std(x: Tensor) -> Tensor:
    """The standard deviation over all but the batch, kept broadcastable."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Projected(AgainstNull):
    """Adaptive projected guidance in x0: D + (scale - 1) (d_across + parallel d_along), d = D - D_null.

    d is first shortened to `max_norm` where that is positive, then split along and across D, per sample: the part along
    D is what saturates. The paper's momentum is left out. With parallel 1 and no max_norm it is classifier-free
    guidance. Sadat et al. 2024 (arXiv 2410.02416), algorithm 1.
    """

    kind: Literal["apg"] = "apg"
    parallel: float = 0.0
    max_norm: float = 0.0
    limits: ClassVar = {**AgainstNull.limits, "max_norm": "[0, inf]"}

    def spared(self, x: Tensor, t: Tensor, denoiser: Conditional, cond: Cond, null: Cond) -> Denoised | None:
        return None

    def mix(self, told: Denoised, absent: Denoised, x: Tensor, level: Level) -> Denoised:
        d, push = told.x0, told.x0 - absent.x0
        short = (self.max_norm / dot(push, push).sqrt().clamp(min=1e-12)).clamp(max=1) if self.max_norm else 1.0

        def pushed(end: Tensor, push: Tensor) -> Tensor:
            along = d * (dot(push, d) / dot(d, d).clamp(min=1e-12))
            return end + (self.scale - 1) * short * (push - (1 - self.parallel) * along)

        # One linear rule for both ends: where alpha d_x0 + sigma d_eps = 0, its results make up x_t as well.
        return told._replace(x0=pushed(d, push), eps=pushed(told.eps, told.eps - absent.eps))


@dataclass(frozen=True, kw_only=True)
class CFGZeroStar(AgainstNull):
    """CFG-zero* in u = eps - x0, the velocity of `flow`: k u_null + scale (u - k u_null) with k = <u, u_null> over
    ||u_null||^2, per sample; and no motion at all on noise shares from `zero_from` on, where an under-trained model
    does harm: t = 1 counts as 1 on every process. `zero_in` "t" means times of the schedule itself, as runs of old do.

    Every process is the flow at w = sigma / (alpha + sigma), scaled by alpha + sigma: there u = 0 stands still, at
    x0 = eps = x / (alpha + sigma). dx/dt = 0 would not: on `edm` it is eps = 0, a sample that is all signal.
    Fan et al. 2025 (arXiv 2503.18886), eq. 10 and algorithm 1.
    """

    kind: Literal["cfg-zero-star"] = "cfg-zero-star"
    zero_from: float = 1.0
    zero_in: Literal["noise-share", "t"] = "noise-share"
    limits: ClassVar = {**AgainstNull.limits, "zero_from": "(0, inf]"}

    def spared(self, x: Tensor, t: Tensor, denoiser: Conditional, cond: Cond, null: Cond) -> Denoised | None:
        if (t if t == 1 else place(t, denoiser.schedule, self.zero_in)) < self.zero_from:
            return None
        alpha, sigma = denoiser.schedule(t)
        still = x / match(alpha + sigma, x)
        # Only a learned variance is worth a call here.
        return Denoised(still, still, denoiser(x, t, cond).log_var_frac if denoiser.learned_variance else None)

    def mix(self, told: Denoised, absent: Denoised, x: Tensor, level: Level) -> Denoised:
        total = level.alpha + level.sigma
        still, w, rest = x / match(total, x), match(level.sigma / total, x), match(level.alpha / total, x)
        u, u_null = told.eps - told.x0, absent.eps - absent.x0
        u_null = u_null * (dot(u, u_null) / dot(u_null, u_null).clamp(min=1e-12))
        u = torch.lerp(u_null, u, self.scale)
        return told._replace(x0=still - w * u, eps=still + rest * u)


@dataclass(frozen=True, kw_only=True)
class Autoguidance(Scaled):
    """weak + scale (strong - weak): guidance by a worse version of the same denoiser under the same condition.

    The weaker model is the same network trained for less, or smaller; no null is needed, and scale 1 never calls it.
    Karras et al. 2024 (arXiv 2406.02507), eq. 2. Raises ValueError when the two walk different schedules.
    """

    kind: Literal["autoguidance"] = "autoguidance"
    scale: float = 2.0

    def close(self, denoiser: Conditional, cond: Cond, null: Cond | None, helpers: Helpers) -> Denoise:
        if helpers.weak is None:
            raise ValueError("autoguidance needs a weaker model of the same process beside the denoiser")
        if helpers.weak.schedule != denoiser.schedule:
            raise ValueError("autoguidance needs two denoisers of one schedule: as the weaker one take an earlier "
                             "checkpoint of the same run, or a smaller model trained with the same schedule")
        strong, weak = denoiser.bind(cond), helpers.weak.bind(cond)
        return Bound(denoiser.schedule, lambda x, t: _extrapolated(strong(x, t), weak(x, t), self.scale))


@dataclass(frozen=True, kw_only=True)
class Embedded(Scaled):
    """The scale told to a student that was taught to answer as its guided teacher does: one call, and no null.

    Meng et al. 2022 (arXiv 2210.03142). A null is not read, a negative prompt neither: what a student moves away from
    was settled by its training. Unlike others, it is told at scale 1 too.
    """

    kind: Literal["embedded"] = "embedded"
    scale: float = 3.0

    def __call__(self, denoiser: Conditional, cond: Cond, null: Cond | None, helpers: Helpers = ALONE) -> Denoise:
        return self.close(denoiser, cond, null, helpers)

    def close(self, denoiser: Conditional, cond: Cond, null: Cond | None, helpers: Helpers) -> Denoise:
        return denoiser.bind(told_scale(cond, self.scale))


def told_scale(cond: Cond, scale: float) -> Cond:
    """The condition with the guidance scale that a student is told."""
    told: Cond = beside(cond, SCALE, torch.full((len(cond.mask),), scale, device=cond.mask.device))
    return told


@dataclass(frozen=True, kw_only=True)
class ByClassifier(Guidance):
    """`classifier_guided` by the log p(condition | x_t) of the helpers, on top of the condition.

    `strength` 1 is Bayes' rule, and 0 is off. Dhariwal & Nichol 2021 (arXiv 2105.05233), eq. 14.
    """

    kind: Literal["classifier"] = "classifier"
    strength: float = 1.0
    limits: ClassVar = {"strength": "[0, inf)"}

    def __call__(self, denoiser: Conditional, cond: Cond, null: Cond | None, helpers: Helpers = ALONE) -> Denoise:
        if self.strength == 0:
            return denoiser.bind(cond)
        if (judge := helpers.log_prob) is None:
            raise ValueError("classifier guidance needs a log p(condition | x_t) beside the denoiser")
        return classifier_guided(denoiser.bind(cond), lambda x, t: judge(x, t, cond), self.strength)


def classifier_guided(denoise: Denoise, log_prob: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0) -> Denoise:
    """Bayes' rule on scores, in eps: eps - scale sigma grad log p(y | x_t), and x0 + scale sigma^2 / alpha grad.

    `log_prob(x_t, t)` is differentiable in x_t, (B,). At alpha = 0 x_t says nothing of y, and nothing is added.
    Dhariwal & Nichol 2021 (arXiv 2105.05233), eq. 14.
    """

    def call(x: Tensor, t: Tensor) -> Denoised:
        ends, (alpha, sigma) = denoise(x, t), denoise.schedule(t)
        if denoise.schedule.pure_noise and t == 1:
            return ends
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(leaf, t).sum(), leaf)
        push = scale * sigma * gradient
        return ends._replace(x0=ends.x0 + (sigma / alpha) * push, eps=ends.eps - push)

    return Bound(denoise.schedule, call)


GUIDANCES = (ClassifierFree, Projected, CFGZeroStar, Autoguidance, Embedded, ByClassifier)
