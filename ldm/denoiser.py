"""From a network to a denoiser: everything between the raw backbone and what a sampler calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion import Denoised, Diffusion
from ldm.schedules import NoiseSchedule, match

Backbone = Callable[[Tensor, Tensor, Cond], Tensor]


class Denoise(Protocol):
    """What a sampler sees: the schedule it walks, and both ends of x_t at a time t, float64 () on the CPU."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    def __call__(self, x: Tensor, t: Tensor) -> Denoised: ...


@dataclass(frozen=True)
class Denoiser:
    """A backbone and the process it was trained on: (x (B, ...), t () or (B,), cond) -> both ends of x.

    Latents keep their dtype (float32); the network runs under the caller's autocast. Raises ValueError at a time below
    t_min, where it was not trained. `weak` is a poorer model and `log_prob` a noisy classifier, log p(cond | x_t) (B,)
    of (x_t, t, cond), for the guidances that ask for one.
    """

    backbone: Backbone
    diffusion: Diffusion
    weak: Denoiser | None = None
    log_prob: Callable[[Tensor, Tensor, Cond], Tensor] | None = None

    @property
    def schedule(self) -> NoiseSchedule:
        return self.diffusion.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        if t.ndim == 0 and t.item() < self.schedule.t_min * (1 - 1e-9):
            raise ValueError(f"a network is called on [t_min = {self.schedule.t_min:g}, 1], not at t = {t.item():g}; "
                             "t = 0 is only landed on")
        inputs, level = self.diffusion.condition(x, t)
        return self.diffusion.recover(x, self.backbone(inputs, _per_sample(level, x), cond), t)

    def bind(self, cond: Cond) -> Denoise:
        """This denoiser with its condition closed over, ready for a sampler."""
        return _Bound(self, cond)


def _per_sample(level: Tensor, x: Tensor) -> Tensor:
    """The noise level as (B,) float64 on x's device; a CPU scalar goes there as a kernel argument, without waiting."""
    if level.ndim:
        return level.to(x.device, non_blocking=True)
    if level.device == x.device:
        return level.expand(len(x))
    return torch.full((len(x),), level.item(), dtype=level.dtype, device=x.device)


@dataclass(frozen=True)
class _Bound:
    denoiser: Denoiser
    cond: Cond

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        return self.denoiser(x, t, self.cond)


@dataclass(frozen=True)
class Rescheduled:
    """A denoiser of one process walked along another: equal log-SNR, and x rescaled by alpha_trained / alpha.

    x / alpha and sigma / alpha are the same in both processes, so x0 and eps are too. Karras et al. 2022, appendix C.
    Raises ValueError when the walked schedule reaches alpha = 0, where x holds nothing to rescale.
    """

    denoise: Denoise
    schedule: NoiseSchedule

    def __post_init__(self) -> None:
        if self.schedule.pure_noise and not self.denoise.schedule.pure_noise:
            raise ValueError("a schedule with alpha(1) = 0 cannot be walked with a denoiser trained on one without")

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        trained = self.denoise.schedule
        time = trained.time(self.schedule.logsnr(t)).clamp(trained.t_min, 1)
        # The ratios of alpha and of sigma are equal, and sigma is nowhere 0 where the network is called.
        return self.denoise(match(trained(time).sigma / self.schedule(t).sigma, x) * x, time)
