"""Latent normalisation: the one place where raw z and the latents that stage two sees are converted into each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoencoder.posterior import Posterior
from autoencoder.precision import double

SMALLEST_SCALE = 1e-6


class LatentNorm(nn.Module):
    """latents = (z − shift) / scale per channel; the identity until `set_` is called.

    gaussian: whether the encoder gives moments (mean ⊕ logvar) or z alone. shared: one scalar scale and no shift of
    its own per channel, as a quantiser's codes need. shift and scale are float32 buffers (1, C or 1, 1, 1).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, channels: int, *, gaussian: bool = True, shared: bool = False) -> None:
        super().__init__()
        self.gaussian, self.shared = gaussian, shared
        shape = (1, 1 if shared else channels, 1, 1)
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def latents(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """(mean + std·noise − shift) / scale: moments (B, 2C, h, w), noise (B, C, h, w) -> (B, C, h, w).

        Without a posterior (gaussian=False) moments are z itself (B, C, h, w), noise unused. noise None: the mean.
        """
        if not self.gaussian or noise is None:
            return self.mean_latents(moments)
        return self.forward(Posterior.split(moments).sample(noise))

    def mean_latents(self, moments: Tensor) -> Tensor:
        """(mean − shift) / scale, no noise."""
        return self.forward(Posterior.split(moments).mean if self.gaussian else moments)

    def forward(self, z: Tensor) -> Tensor:
        """z -> latents."""
        return (z - self.shift) / self.scale

    def inverse(self, latents: Tensor) -> Tensor:
        """latents -> z = latents·scale + shift."""
        return latents * self.scale + self.shift

    def set_(self, shift: Tensor, scale: Tensor) -> None:
        """Store shift and scale, (C,) each, one element when shared. ValueError unless finite with scale > 0."""
        if shift.numel() != self.shift.numel() or scale.numel() != self.scale.numel():
            raise ValueError(
                f"the latent normaliser has {self.shift.numel()} channel(s), got {shift.numel()} and {scale.numel()}."
            )
        if not (torch.isfinite(shift).all() and torch.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError("the latent shift and scale must be finite and the scale positive.")
        self.shift.copy_(shift.reshape(self.shift.shape))
        self.scale.copy_(scale.reshape(self.scale.shape))


class LatentStatistics:
    """Mean and standard deviation of z over a data set, in one pass and in float64.

    Per channel E[z] = E[mean] and Var[z] = E[mean²] − E[mean]² + E[exp(logvar)]: the posterior's own variance is
    counted exactly (law of total variance), no noise is drawn.
    """

    def __init__(self, norm: LatentNorm, channels: int) -> None:
        self.norm = norm
        self.totals = torch.zeros(4, channels, dtype=torch.float64)  # count, Σ mean, Σ mean², Σ var

    def add(self, moments: Tensor) -> None:
        """Count moments (B, 2C, h, w) (or z (B, C, h, w) for an encoder without posterior)."""
        moments = double(moments)
        posterior = Posterior.split(moments) if self.norm.gaussian else None
        mean = moments if posterior is None else posterior.mean
        var = torch.zeros_like(mean) if posterior is None else posterior.logvar.exp()
        sums = [term.sum((0, 2, 3)) for term in (torch.ones_like(mean), mean, mean.square(), var)]
        self.totals += torch.stack(sums).cpu()

    def fit(self, reduce: Callable[[Tensor], Tensor] = lambda totals: totals) -> None:
        """Set the normaliser from all that was added; `reduce` sums the totals (4, C) over processes.

        A channel that hardly varies (std < 1e-6) keeps scale 1, so that noise in it is not blown up. ValueError if
        nothing was added.
        """
        count, mean, square, var = reduce(self.totals)
        if not count.any():
            raise ValueError("latent statistics need at least one batch of moments.")
        mean, second = mean / count, (square + var) / count
        if self.norm.shared:  # codes of a quantiser: distances must keep their meaning, so one scale and no shift
            std = (second.mean() - mean.mean().square()).clamp_min(0).sqrt().reshape(1)
            mean = torch.zeros_like(std)
        else:
            std = (second - mean.square()).clamp_min(0).sqrt()
        self.norm.set_(mean, torch.where(std < SMALLEST_SCALE, torch.ones_like(std), std))
