"""What every guidance is: from a denoiser, a condition and its absence to one callable for a sampler.

Any conditional denoiser can be guided, and `Guided` is one again: guidances, masks and measurements stand around each
other in any order. `Scaled` and `AgainstNull` hold what members share; they only mix two answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Bound, Conditional, Denoise
from ldm.diffusion import Denoised
from ldm.schedules import Level, NoiseSchedule


@dataclass(frozen=True)
class Helpers:
    """What some guidances ask for beside the denoiser: a poorer model of the same process, and log p(cond | x_t) (B,)
    of (x_t, t, cond), differentiable in x_t."""

    weak: Conditional | None = None
    log_prob: Callable[[Tensor, Tensor, Cond], Tensor] | None = None


ALONE = Helpers()


class Guidance(ABC):
    """A rule that closes a condition over a denoiser."""

    kind: str

    @abstractmethod
    def __call__(self, denoiser: Conditional, cond: Cond, null: Cond | None, helpers: Helpers = ALONE) -> Denoise:
        """The guided denoiser. `null` is the condition's absence or its opposite (a negative prompt), batch 1 or B.
        Raises ValueError when the guidance needs `null` or a helper and gets None."""


@dataclass(frozen=True)
class Guided(Conditional):
    """A denoiser under a guidance whose condition is still open, for another guidance or a mask to wrap."""

    guidance: Guidance
    denoiser: Conditional
    null: Cond | None = None
    helpers: Helpers = ALONE

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    @property
    def learned_variance(self) -> bool:
        return self.denoiser.learned_variance

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        return self.guidance(self.denoiser, cond, self.null, self.helpers)(x, t)


@dataclass(frozen=True, kw_only=True)
class Scaled(Guidance):
    """Guidance from a worse answer through the condition's own, as far as `scale` says; 1 is the condition alone."""

    kind: str
    scale: float = 4.0

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise ValueError(f"guidance scale must be at least 0 (1 is off), got {self.scale}")

    def __call__(self, denoiser: Conditional, cond: Cond, null: Cond | None, helpers: Helpers = ALONE) -> Denoise:
        return denoiser.bind(cond) if self.scale == 1 else self.close(denoiser, cond, null, helpers)

    @abstractmethod
    def close(self, denoiser: Conditional, cond: Cond, null: Cond | None, helpers: Helpers) -> Denoise:
        """At another scale than 1."""


class AgainstNull(Scaled):
    """Guidance away from the null: both answers come from one call of twice the batch, and a member mixes them."""

    @abstractmethod
    def spared(self, x: Tensor, t: Tensor, denoiser: Conditional, cond: Cond, null: Cond) -> Denoised | None:
        """The answer where one call at most is enough for it, else None."""

    @abstractmethod
    def mix(self, told: Denoised, absent: Denoised, x: Tensor, level: Level) -> Denoised:
        """The guided pair of x_t, from those with the condition and without; told's variance stays."""

    def close(self, denoiser: Conditional, cond: Cond, null: Cond | None, helpers: Helpers) -> Denoise:
        if null is None:
            raise ValueError("guidance at another scale than 1 needs a null condition: the empty caption encoded")
        batch, other = len(cond.mask), cond.absence(null)
        pair = Cond.cat([cond, other])

        def call(x: Tensor, t: Tensor) -> Denoised:
            if (ends := self.spared(x, t, denoiser, cond, other)) is not None:
                return ends
            x0, eps, fraction = denoiser(torch.cat([x, x]), t, pair)
            told = Denoised(x0[:batch], eps[:batch], None if fraction is None else fraction[:batch])
            return self.mix(told, Denoised(x0[batch:], eps[batch:]), x, denoiser.schedule(t))

        return Bound(denoiser.schedule, call)
