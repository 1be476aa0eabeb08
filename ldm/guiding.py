"""What every guidance is: from a denoiser, a condition and its absence to one callable for a sampler.

Any conditional denoiser can be guided, and `Guided` is one again: guidances, masks and measurements stand around each
other in any order. `Scaled` and `AgainstNull` hold what members share; they only mix two answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.conditioning import Cond
from ldm.denoiser import Around, Bound, Conditional, Denoise
from ldm.diffusion import Denoised
from ldm.schedules import Level, NoiseSchedule


@dataclass(frozen=True)
class Helpers:
    """What some guidances ask for beside the denoiser: a poorer model of the same process, and log p(cond | x_t) (B,)
    of (x_t, t, cond), differentiable in x_t."""

    weak: Conditional | None = None
    log_prob: Callable[[Tensor, Tensor, Cond], Tensor] | None = None


ALONE = Helpers()


class Guidance(Checked, ABC):
    """A rule that closes a condition over a denoiser."""

    @abstractmethod
    def __call__(self, denoiser: Conditional, cond: Cond, null: Cond | None, helpers: Helpers = ALONE) -> Denoise:
        """The guided denoiser. `null` is the condition's absence or its opposite (a negative prompt), batch 1 or B.
        Raises ValueError when the guidance needs `null` or a helper and gets None."""


@dataclass(frozen=True)
class Guided(Around):
    """A denoiser under a guidance whose condition is still open, for another guidance or a mask to wrap."""

    guidance: Guidance
    denoiser: Conditional
    null: Cond | None = None
    helpers: Helpers = ALONE

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        return self.guidance(self.denoiser, cond, self.null, self.helpers)(x, t)


def together(denoiser: Conditional, conds: Sequence[Cond]) -> Callable[[Tensor, Tensor], list[Denoised]]:
    """(x, t) -> the answer under each condition, from one call of as many times the batch."""
    joint = Cond.cat(conds)

    def call(x: Tensor, t: Tensor) -> list[Denoised]:
        ends = denoiser(torch.cat([x] * len(conds)), t, joint)
        parts = (part.chunk(len(conds)) for part in ends if part is not None)
        return [Denoised(*part) for part in zip(*parts, strict=True)]

    return call


def place(t: Tensor, schedule: NoiseSchedule, unit: str) -> Tensor:
    """Where t stands: t itself where `unit` is "t", else the share of noise sigma / (alpha + sigma)."""
    alpha, sigma = schedule(t)
    return t if unit == "t" else sigma / (alpha + sigma)


@dataclass(frozen=True, kw_only=True)
class Scaled(Guidance):
    """Guidance from a worse answer through the condition's own, as far as `scale` says; 1 is the condition alone."""

    kind: str
    scale: float = 4.0
    limits: ClassVar = {"scale": "[0, inf)"}

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
        other = cond.absence(null)
        both = together(denoiser, [cond, other])

        def call(x: Tensor, t: Tensor) -> Denoised:
            if (ends := self.spared(x, t, denoiser, cond, other)) is not None:
                return ends
            told, absent = both(x, t)
            return self.mix(told, absent, x, denoiser.schedule(t))

        return Bound(denoiser.schedule, call)
