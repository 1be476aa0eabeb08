"""From a network to a denoiser: everything between the raw backbone and what a sampler calls.

Of x_t = alpha x0 + sigma eps a *network* answers y of (c_in x_t, noise level, cond), as it was trained to; a
*conditional denoiser* answers both ends, `Denoised(x0, eps)`, of (x_t, t, cond); and a `Denoise` is one with its
condition closed over, all that a sampler sees. A guidance, mask or measurement wraps a conditional denoiser and is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from autoencoder.base import size_in_words
from ldm.conditioning import Cond
from ldm.diffusion import Denoised, Diffusion
from ldm.schedules import NoiseSchedule, per_sample

Network = Callable[[Tensor, Tensor, Cond], Tensor]


class Denoise(Protocol):
    """What a sampler sees: the schedule it walks, and both ends of x_t at a time t, float64 () on the CPU."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    def __call__(self, x: Tensor, t: Tensor) -> Denoised: ...


class Conditional(Protocol):
    """Both ends of x_t under a condition: a network's own `Denoiser`, or anything that wraps one.

    A class that derives from it has `bind`, and answers no learned variance unless it says so.
    """

    @property
    def schedule(self) -> NoiseSchedule: ...

    @property
    def learned_variance(self) -> bool:
        """Whether the ends come with a log_var_frac."""
        return False

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised: ...

    def bind(self, cond: Cond) -> Denoise:
        """This denoiser with its condition closed over, ready for a sampler."""
        return Bound(self.schedule, lambda x, t: self(x, t, cond))


class Around(Conditional):
    """What stands around another conditional denoiser, its field `denoiser`: on the same schedule, with its variance.
    """

    denoiser: Conditional

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    @property
    def learned_variance(self) -> bool:
        return self.denoiser.learned_variance


@dataclass(frozen=True)
class Bound:
    """A schedule and what is called for both ends, all but (x, t) closed over."""

    schedule: NoiseSchedule
    call: Callable[[Tensor, Tensor], Denoised]

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        return self.call(x, t)


@dataclass(frozen=True, repr=False)
class Denoiser(Conditional):
    """A backbone and the process it was trained on: (x (B, ...), t () or (B,), cond) -> both ends of x.

    Latents keep their dtype (float32); the network runs under the caller's autocast. Raises ValueError at a time below
    t_min, where it was not trained.
    """

    backbone: Network
    diffusion: Diffusion

    def __repr__(self) -> str:
        process = f"predicts {self.diffusion.prediction.kind} on the schedule {self.schedule.kind}"
        return f"denoiser {type(self.backbone).__name__}: {size_in_words(self.backbone)}, {process}"

    @property
    def schedule(self) -> NoiseSchedule:
        return self.diffusion.schedule

    @property
    def learned_variance(self) -> bool:
        return self.diffusion.learned_variance

    def check(self, t: Tensor) -> None:
        """Raises ValueError at a time () below t_min."""
        if t.ndim == 0 and t.item() < self.schedule.t_min * (1 - 1e-9):
            raise ValueError(f"a network is called on [t_min = {self.schedule.t_min:g}, 1], not at t = {t.item():g}; "
                             "t = 0 is only landed on")

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        self.check(t)
        inputs, level = self.diffusion.condition(x, t)
        return self.diffusion.recover(x, self.backbone(inputs, per_sample(level, x), cond), t)
