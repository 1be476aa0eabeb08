"""Guidance: from a denoiser, a condition and its absence to one callable for a sampler, itself a denoiser.

Any combination with weights that sum to one of pairs (x0, eps) that make up x_t makes up x_t too, whichever of x0, eps
or velocity it is written in; where a guidance does more, it names the space it works in and completes the pair. A
learned variance stays the condition's own. A new guidance is a class and an entry in `GUIDANCES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Denoise, Denoiser
from ldm.diffusion import Denoised
from ldm.schedules import NoiseSchedule, match


class Guidance(ABC):
    """A rule that closes a condition over a denoiser."""

    kind: str

    @abstractmethod
    def __call__(self, denoiser: Denoiser, cond: Cond, null: Cond | None) -> Denoise:
        """The guided denoiser. `null` is the condition's absence or its opposite (a negative prompt), batch 1 or B.
        Raises ValueError when the guidance needs `null` and gets None."""


@dataclass(frozen=True)
class Guided:
    """A guided denoiser: a schedule and what is called for both ends."""

    schedule: NoiseSchedule
    call: Callable[[Tensor, Tensor], Denoised]

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        return self.call(x, t)


def both(denoiser: Denoiser, cond: Cond, null: Cond) -> Callable[[Tensor, Tensor], tuple[Denoised, Denoised]]:
    """One call of twice the batch that answers with and without the condition."""
    batch = len(cond.mask)
    pair = Cond.cat([cond, null.expand(batch)])

    def call(x: Tensor, t: Tensor) -> tuple[Denoised, Denoised]:
        x0, eps, fraction = denoiser(torch.cat([x, x]), t, pair)
        return (Denoised(x0[:batch], eps[:batch], None if fraction is None else fraction[:batch]),
                Denoised(x0[batch:], eps[batch:]))

    return call


@dataclass(frozen=True, kw_only=True)
class ClassifierFree(Guidance):
    """uncond + scale (cond - uncond), on times in `interval`; the plain condition elsewhere.

    Scale 1 never calls without the condition, scale 0 never with it. `rescale` in [0, 1] moves the standard deviation
    of the guided x0, per sample, back to the conditional one's. Ho & Salimans 2022 (arXiv 2207.12598), eq. 6; interval:
    Kynkaanniemi et al. 2024 (arXiv 2404.07724); rescale: Lin et al. 2023 (arXiv 2305.08891), eq. 15 and 16, in x0.
    """

    kind: Literal["classifier-free"] = "classifier-free"
    scale: float = 4.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise ValueError(f"guidance scale must be at least 0 (1 is off), got {self.scale}")
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"guidance interval must be two times 0 <= low <= high <= 1, got {self.interval}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale must be in [0, 1], got {self.rescale}")

    def __call__(self, denoiser: Denoiser, cond: Cond, null: Cond | None) -> Denoise:
        if self.scale == 1:
            return denoiser.bind(cond)
        null = _needed(null)
        plain, pair = denoiser.bind(cond), both(denoiser, cond, null)
        absent = denoiser.bind(null.expand(len(cond.mask)))

        def call(x: Tensor, t: Tensor) -> Denoised:
            if not self.interval[0] <= t <= self.interval[1]:
                return plain(x, t)
            if self.scale == 0:
                return absent(x, t)
            with_cond, without = pair(x, t)
            guided = Denoised(torch.lerp(without.x0, with_cond.x0, self.scale),
                              torch.lerp(without.eps, with_cond.eps, self.scale), with_cond.log_var_frac)
            if self.rescale == 0:
                return guided
            return rescaled(guided, with_cond, self.rescale)

        return Guided(denoiser.schedule, call)


def rescaled(guided: Denoised, told: Denoised, share: float) -> Denoised:
    """x0 moved by `share` to the standard deviation of told's, per sample, and the eps that keeps x_t what it is.

    With r = std told / std guided, x0 becomes (1 + share (r - 1)) x0 and eps grows by share alpha (1 - r) / sigma x0.
    That factor is written by a covariance with alpha (guided - told) / sigma in x0, which is told - guided in eps, and
    so without a division by sigma: where that is 0, r is 1, and the factor is finite.
    """
    wanted, std, total = per_sample_std(told.x0), per_sample_std(guided.x0), told.x0 + guided.x0
    off = total - total.mean(dim=tuple(range(1, total.ndim)), keepdim=True)
    factor = _dot(told.eps - guided.eps, off) / (off[0].numel() - 1) / (std * (std + wanted))
    x0 = guided.x0 * (1 + share * (wanted / std - 1))
    return guided._replace(x0=x0, eps=guided.eps + share * factor * guided.x0)


def per_sample_std(x: Tensor) -> Tensor:
    """The standard deviation over all but the batch, kept broadcastable."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each pair of samples, kept broadcastable."""
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Projected(Guidance):
    """Adaptive projected guidance in x0: D + (scale - 1) (d_across + parallel d_along), d = D - D_null.

    d is first shortened to `max_norm` where that is positive, then split along and across D, per sample: the part along
    D is what saturates. The paper's momentum is left out: a denoiser here remembers no earlier call. With parallel 1
    and no max_norm it is classifier-free guidance. Sadat et al. 2024 (arXiv 2410.02416), algorithm 1.
    """

    kind: Literal["apg"] = "apg"
    scale: float = 4.0
    parallel: float = 0.0
    max_norm: float = 0.0

    def __post_init__(self) -> None:
        if not (self.scale >= 0 and self.max_norm >= 0):
            raise ValueError(f"apg needs scale and max_norm of at least 0, got {self.scale} and {self.max_norm}")

    def __call__(self, denoiser: Denoiser, cond: Cond, null: Cond | None) -> Denoise:
        if self.scale == 1:
            return denoiser.bind(cond)
        pair = both(denoiser, cond, _needed(null))

        def call(x: Tensor, t: Tensor) -> Denoised:
            with_cond, without = pair(x, t)
            pushes, d = (with_cond.x0 - without.x0, with_cond.eps - without.eps), with_cond.x0
            size = _dot(pushes[0], pushes[0]).sqrt().clamp(min=1e-12)
            short = (self.max_norm / size).clamp(max=1) if self.max_norm else 1.0

            def pushed(end: Tensor, push: Tensor) -> Tensor:
                along = d * (_dot(push, d) / _dot(d, d).clamp(min=1e-12))
                return end + (self.scale - 1) * short * (push - (1 - self.parallel) * along)

            # One linear rule for both ends: where alpha d_x0 + sigma d_eps = 0, its results make up x_t as well.
            return with_cond._replace(x0=pushed(d, pushes[0]), eps=pushed(with_cond.eps, pushes[1]))

        return Guided(denoiser.schedule, call)


@dataclass(frozen=True, kw_only=True)
class CFGZeroStar(Guidance):
    """CFG-zero* in u = eps - x0, the velocity of `flow`: k u_null + scale (u - k u_null) with k = <u, u_null> over
    ||u_null||^2, per sample; and no motion at all at times from `zero_from` on, where an under-trained model does harm.

    Every process is the flow at w = sigma / (alpha + sigma), scaled by alpha + sigma: there u = 0 stands still, at
    x0 = eps = x / (alpha + sigma). dx/dt = 0 would not: on `edm` it is eps = 0, a sample that is all signal.
    Fan et al. 2025 (arXiv 2503.18886), eq. 10 and algorithm 1.
    """

    kind: Literal["cfg-zero-star"] = "cfg-zero-star"
    scale: float = 4.0
    zero_from: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise ValueError(f"guidance scale must be at least 0 (1 is off), got {self.scale}")
        if not self.zero_from > 0:
            raise ValueError(f"cfg-zero-star zero_from must be positive (above 1 is never), got {self.zero_from}")

    def __call__(self, denoiser: Denoiser, cond: Cond, null: Cond | None) -> Denoise:
        if self.scale == 1:
            return denoiser.bind(cond)
        plain, pair = denoiser.bind(cond), both(denoiser, cond, _needed(null))

        def call(x: Tensor, t: Tensor) -> Denoised:
            alpha, sigma = denoiser.schedule(t)
            total = alpha + sigma
            still = x / match(total, x)
            if t >= self.zero_from:
                # Only a learned variance is worth a call here.
                learned = denoiser.diffusion.learned_variance
                return Denoised(still, still, plain(x, t).log_var_frac if learned else None)
            told, absent = pair(x, t)
            u, u_null = told.eps - told.x0, absent.eps - absent.x0
            u_null = u_null * (_dot(u, u_null) / _dot(u_null, u_null).clamp(min=1e-12))
            u = torch.lerp(u_null, u, self.scale)
            return told._replace(x0=still - match(sigma / total, x) * u, eps=still + match(alpha / total, x) * u)

        return Guided(denoiser.schedule, call)


def _needed(null: Cond | None) -> Cond:
    if null is None:
        raise ValueError("guidance at a scale other than 1 needs a null condition: the encoding of the empty caption")
    return null


def autoguided(denoise: Denoise, weak: Denoise, scale: float) -> Denoise:
    """weak + scale (strong - weak): guidance by a worse version of the same denoiser, both already conditioned.

    Scale 1 never calls the weak one. Karras et al. 2024 (arXiv 2406.02507), eq. 2. Raises ValueError when the two walk
    different schedules.
    """
    if denoise.schedule != weak.schedule:
        raise ValueError("autoguidance needs two denoisers of one schedule; wrap one in ldm.denoiser.Rescheduled")
    if scale == 1:
        return denoise

    def call(x: Tensor, t: Tensor) -> Denoised:
        strong, poor = denoise(x, t), weak(x, t)
        return strong._replace(x0=torch.lerp(poor.x0, strong.x0, scale), eps=torch.lerp(poor.eps, strong.eps, scale))

    return Guided(denoise.schedule, call)


@dataclass(frozen=True, kw_only=True)
class Autoguidance(Guidance):
    """`autoguided` under the same condition by the weaker model that the denoiser carries; no null is needed.

    The weaker model is the same network trained for less, or smaller. Karras et al. 2024 (arXiv 2406.02507), eq. 2.
    """

    kind: Literal["autoguidance"] = "autoguidance"
    scale: float = 2.0

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise ValueError(f"guidance scale must be at least 0 (1 is off), got {self.scale}")

    def __call__(self, denoiser: Denoiser, cond: Cond, null: Cond | None) -> Denoise:
        if self.scale == 1:
            return denoiser.bind(cond)
        if denoiser.weak is None:
            raise ValueError("autoguidance needs a weaker model of the same process beside the denoiser")
        return autoguided(denoiser.bind(cond), denoiser.weak.bind(cond), self.scale)


@dataclass(frozen=True, kw_only=True)
class ByClassifier(Guidance):
    """`classifier_guided` by the log p(condition | x_t) that the denoiser carries, on top of the condition.

    `strength` 1 is Bayes' rule, and 0 is off. Dhariwal & Nichol 2021 (arXiv 2105.05233), eq. 14.
    """

    kind: Literal["classifier"] = "classifier"
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"classifier strength must be at least 0 (0 is off), got {self.strength}")

    def __call__(self, denoiser: Denoiser, cond: Cond, null: Cond | None) -> Denoise:
        judge = denoiser.log_prob
        if self.strength == 0:
            return denoiser.bind(cond)
        if judge is None:
            raise ValueError("classifier guidance needs a log p(condition | x_t) beside the denoiser")
        return classifier_guided(denoiser.bind(cond), lambda x, t: judge(x, t, cond), self.strength)


def classifier_guided(denoise: Denoise, log_prob: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0) -> Denoise:
    """Bayes' rule on scores, in eps: eps - scale sigma grad log p(y | x_t), and x0 + scale sigma^2 / alpha grad.

    `log_prob(x_t, t)` is differentiable in x_t, (B,). At alpha = 0 x_t says nothing of y, and nothing is added. Scale 0
    is the denoiser itself. Dhariwal & Nichol 2021 (arXiv 2105.05233), eq. 14.
    """
    if scale == 0:
        return denoise

    def call(x: Tensor, t: Tensor) -> Denoised:
        ends, (alpha, sigma) = denoise(x, t), denoise.schedule(t)
        if denoise.schedule.pure_noise and t == 1:
            return ends
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(leaf, t).sum(), leaf)
        push = scale * sigma * gradient
        return ends._replace(x0=ends.x0 + (sigma / alpha) * push, eps=ends.eps - push)

    return Guided(denoise.schedule, call)


GUIDANCES = (ClassifierFree, Projected, CFGZeroStar, Autoguidance, ByClassifier)
