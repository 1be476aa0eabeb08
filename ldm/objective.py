"""The training loss of a denoiser: draw a time and a noise for each sample, and compare with the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Network
from ldm.diffusion import Diffusion
from ldm.noise import Noise
from ldm.pairing import Independent, Pairing
from ldm.times import Places, TimeSampling
from ldm.uncertainty import Weighed
from ldm.variational import bound_at, walk_steps
from ldm.weighting import Weighting

Trained = Network | Callable[[Tensor, Tensor, Cond], Tensor | Weighed]


class Draw(NamedTuple):
    """What a batch is trained on: times (B,) float64, noise (B, ...), and the factor (B,) that undoes their choice."""

    t: Tensor
    eps: Tensor
    factor: Tensor


class Losses(NamedTuple):
    """(B,) float32 each: what is minimised, and the same before the factor that undoes the choice of times."""

    total: Tensor
    seen: Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """weight(t) ||network(c_in x_t, noise level, cond) - y||^2, a mean over all but the batch.

    x0 (B, ...) are normalised latents; noise has one seed per sample, folded by the caller with the training step. With
    a learned variance T / 1000 times the variational bound is added, through which only the variance learns (Nichol &
    Dhariwal 2021, arXiv 2102.09672, eq. 16); where the network answers `Weighed` the loss is divided by exp(u) and u
    is added. Raises ValueError where the schedule has no such times.
    """

    diffusion: Diffusion
    times: TimeSampling
    weighting: Weighting
    pairing: Pairing = Independent()  # noqa: RUF009  # frozen, without state

    def __post_init__(self) -> None:
        self.times.draw(torch.full((1,), 0.5, dtype=torch.float64), self.diffusion.schedule)

    def __call__(self, backbone: Trained, x0: Tensor, cond: Cond, noise: Noise, places: Places | None = None) -> Tensor:
        """The loss of each sample, (B,) float32. `places` in the global batch are needed where times are stratified."""
        return self.losses(backbone, x0, cond, self.draw(x0, noise, places)).total

    def draw(self, x0: Tensor, noise: Noise, places: Places | None = None, seen: Tensor | None = None) -> Draw:
        """Times and noise for a batch; `seen` is what loss-aware times go by, none being uniform times.

        Raises ValueError where stratified times lack the places of their samples.
        """
        u = noise.uniform((), "time")
        if self.times.stratified:
            if places is None:
                raise ValueError("stratified times need the places of the samples in their global batch")
            u = places.stratify(u)
        t, factor = self.times.draw(u, self.diffusion.schedule, seen)
        return Draw(t, self.pairing(x0, noise.normal(x0.shape[1:], "eps", dtype=x0.dtype)), factor)

    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw) -> Losses:
        """What a batch costs at the times and with the noise drawn for it."""
        error, y, log_var, x_t = self._compared(backbone, x0, cond, draw.t, draw.eps)
        loss = self.weighting(self.diffusion, draw.t).float() * error
        if log_var is not None:
            loss = loss * (-log_var).exp() + log_var
        if self.diffusion.learned_variance:
            schedule, (mean, v) = self.diffusion.schedule, y.chunk(2, dim=1)
            ends = self.diffusion.recover(x_t, torch.cat([mean.detach(), v], dim=1), draw.t)
            loss = loss + bound_at(schedule, ends, x0, draw.t).float() * (walk_steps(schedule) / 1000)
        return Losses(draw.factor.float() * loss, loss)

    def at(self, backbone: Trained, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor) -> Tensor:
        """The unweighted error at given times (B,) and noise, (B,) float32: what validation by noise level reads."""
        return self._compared(backbone, x0, cond, t, eps)[0]

    def _compared(self, backbone: Trained, x0: Tensor, cond: Cond, t: Tensor,
                  eps: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The error, the prediction and its expected loss where there is one, and x_t."""
        x_t = self.diffusion.perturb(x0, eps, t)
        answer = backbone(*self.diffusion.condition(x_t, t), cond)
        y, log_var = answer if isinstance(answer, Weighed) else (answer, None)
        told = y.chunk(2, dim=1)[0] if self.diffusion.learned_variance else y
        error = told.float() - self.diffusion.target(x0, eps, t).float()
        return error.square().flatten(1).mean(1), y, log_var, x_t
