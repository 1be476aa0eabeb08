"""Guidance: from a denoiser, a condition and its absence to one callable for a sampler, itself a denoiser.

Any combination with weights that sum to one of pairs (x0, eps) that make up x_t makes up x_t too, whichever of x0, eps
or velocity it is written in; where a guidance does more, it names the space it works in and completes the pair.
A new guidance is a class and an entry in `GUIDANCES`.
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
from ldm.schedules import NoiseSchedule


class Guidance(ABC):
    """A rule that closes a condition over a denoiser."""

    kind: str

    @abstractmethod
    def __call__(self, denoiser: Denoiser, cond: Cond, null: Cond | None) -> Denoise:
        """The guided denoiser. `null` is the condition's absence or its opposite (a negative prompt), batch 1 or B.
        Raises ValueError when the guidance needs `null` and gets None."""


@dataclass(frozen=True)
class _Guided:
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

    Scale 1 never calls without the condition, scale 0 never with it. `rescale` in [0, 1] moves the standard deviation of
    the guided x0, per sample, back to the conditional one's. Ho & Salimans 2022 (arXiv 2207.12598), eq. 6; interval:
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
        if null is None:
            raise ValueError("guidance at a scale other than 1 needs a null condition: the encoding of the empty caption")
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
            ratio = per_sample_std(with_cond.x0) / per_sample_std(guided.x0)
            return guided.with_x0(guided.x0 * (1 + self.rescale * (ratio - 1)), x, denoiser.schedule(t))

        return _Guided(denoiser.schedule, call)


def per_sample_std(x: Tensor) -> Tensor:
    """The standard deviation over all but the batch, kept broadcastable."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)


GUIDANCES = (ClassifierFree,)
