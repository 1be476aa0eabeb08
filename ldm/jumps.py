"""Few-step models: denoisers that also say where x_t is at another time s.

A jump is a pair (x0, eps) that makes up x_t at t, and x_s at s: x_s = alpha_s x0 + sigma_s eps. At s = t it is what any
denoiser answers, so that a few-step model is one too. Every process is the flow at w = sigma / (alpha + sigma), scaled
by alpha + sigma, and there eps - x0 of a jump is the average velocity between both times (MeanFlow's u).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from torch import Tensor

from ldm.denoiser import Denoise, Denoiser
from ldm.diffusion import Denoised, Diffusion
from ldm.schedules import NoiseSchedule, match, per_sample

SPAN = "span"  # the extra of a condition that says how far a jump goes, in shares of noise
SCALE = "guidance_scale"  # the extra that says by which scale a student's answer is guided

Reading = Callable[[Diffusion, Tensor, Tensor, Tensor], Denoised]
"""(diffusion, x_t, y, t) -> both ends: how what a network answers is understood."""
Aim = Literal["any", "clean", "next", "none"]
"""Where its answer at x_t goes: to the time that it is told; to the clean end; to the next time of the grid that it
was taught on; or nowhere: it answers as a denoiser does, and few steps are enough because the way is straight.
"""


class Jump(Denoise, Protocol):
    """What the few-step samplers see: a `Denoise` that jumps."""

    def jump(self, x: Tensor, t: Tensor, s: Tensor) -> Denoised:
        """The pair that makes up x at t, and at s where the model takes x to; t and s float64 () on the CPU."""


@dataclass(frozen=True)
class BoundJump:
    """A schedule and what is called for a jump, all but (x, t, s) closed over."""

    schedule: NoiseSchedule
    call: Callable[[Tensor, Tensor, Tensor], Denoised]

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        return self.call(x, t, t)

    def jump(self, x: Tensor, t: Tensor, s: Tensor) -> Denoised:
        """See `Jump.jump`."""
        return self.call(x, t, s)


def jumps(denoise: Denoise) -> bool:
    """Whether it jumps, and what it wraps does: `Known`, `Windows` and `Thresholded` keep the jumps of theirs."""
    inner: Denoise | None = getattr(denoise, "denoise", None)
    return hasattr(denoise, "jump") and (inner is None or jumps(inner))


def jumping(denoise: Denoise) -> Jump:
    """The same, as one that jumps. Raises ValueError for a plain denoiser, and one whose jumps a wrapper hides."""
    if not jumps(denoise):
        raise ValueError("this sampler takes the steps of a few-step model, and what it is given has no jump: draw "
                         "with a model of distill_denoiser, at no guidance but its own, or take --sampler dpmpp-2m")
    return cast(Jump, denoise)


def plainly(diffusion: Diffusion, x: Tensor, y: Tensor, t: Tensor) -> Denoised:
    """The network's prediction, as of every denoiser."""
    return diffusion.recover(x, y, t)


@dataclass(frozen=True, repr=False)
class Jumping(Denoiser):
    """A backbone that was taught to jump: (x (B, ...), t, s () or (B,), cond) -> both ends.

    `reading` says how its answer is understood; where it is told `spans`, it reads how far the jump goes from the
    condition's extra "span", and its answer at s = t is the denoiser's own; else one answer serves every s, and is
    right for those that its `aim` says. `own_grid`: it was taught at the times of the grid `uniform` of its steps, and
    at no others.
    """

    reading: Reading = plainly
    spans: bool = False
    aim: Aim = "any"
    own_grid: bool = False

    @property
    def denoises(self) -> bool:
        """Whether its answer at s = t is a denoiser's, that of its data or of a guided one: what ODEs, likelihoods and
        posteriors are made of."""
        return self.aim in ("any", "none")

    def __call__(self, x: Tensor, t: Tensor, cond: Any) -> Denoised:
        return self.jump(x, t, t, cond)

    def jump(self, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> Denoised:
        """Both ends of the jump from t to s. Raises ValueError at a time below t_min."""
        self.check(t)
        if self.spans:
            far = noise_share(self.schedule, t) - noise_share(self.schedule, s)
            cond = beside(cond, SPAN, per_sample(far, x))
        inputs, level = self.diffusion.condition(x, t)
        return self.reading(self.diffusion, x, self.backbone(inputs, per_sample(level, x), cond), t)

    def bind(self, cond: Any) -> BoundJump:
        return BoundJump(self.schedule, lambda x, t, s: self.jump(x, t, s, cond))


def beside(cond: Any, name: str, value: Tensor) -> Any:
    """The condition, or captions that stand for one, with one more extra (B,)."""
    return cond._replace(extras={**cond.extras, name: value})


def noise_share(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """sigma / (alpha + sigma): on every process the time of `flow`."""
    alpha, sigma = schedule(t)
    return sigma / (alpha + sigma)


def share_time(schedule: NoiseSchedule, share: Tensor) -> Tensor:
    """The time in [0, 1] of a share of noise in [0, 1]: the inverse of `noise_share`, 0 below what the process has."""
    return schedule.time(2 * ((1 - share) / share).log()).clamp(0, 1)


def mixed(schedule: NoiseSchedule, ends: Denoised, s: Tensor) -> Tensor:
    """x at s (), or (B,) one for each sample: alpha_s x0 + sigma_s eps."""
    alpha, sigma = schedule(s)
    return match(alpha, ends.x0) * ends.x0 + match(sigma, ends.x0) * ends.eps


def chord(schedule: NoiseSchedule, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Denoised:
    """The pair whose straight mix is x_t at t and x_s at s < t: what a jump between them answers.

    With d = alpha_s sigma_t - alpha_t sigma_s > 0: x0 = (sigma_t x_s - sigma_s x_t) / d, eps = (alpha_s x_t - alpha_t
    x_s) / d. Salimans & Ho 2022 (arXiv 2202.00512), appendix G, solved for x0.
    """
    (a_t, b_t), (a_s, b_s) = schedule(t), schedule(s)
    d = a_s * b_t - a_t * b_s
    return Denoised(match(b_t / d, x_t) * x_s - match(b_s / d, x_t) * x_t,
                    match(a_s / d, x_t) * x_t - match(a_t / d, x_t) * x_s)


def averaged(schedule: NoiseSchedule, x_t: Tensor, u: Tensor, t: Tensor) -> Denoised:
    """The pair that makes up x_t and has eps - x0 = u, an average velocity: x0 = (x_t - sigma u) / (alpha + sigma)."""
    alpha, sigma = schedule(t)
    x0 = match(1 / (alpha + sigma), x_t) * x_t - match(sigma / (alpha + sigma), x_t) * u
    return Denoised(x0, x0 + u)
