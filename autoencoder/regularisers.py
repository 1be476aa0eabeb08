"""Regularisers that make a latent space easier to diffuse in. A new one is a class and an entry in the last line."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoder.base import Autoencoder

FLOOR = 1e-8  # of the power in a ring, beside a total of 1


@dataclass(frozen=True)
class Move:
    """Resize to height x width cells, then turn by quarter circles, anticlockwise: one map for latents and images."""

    height: int
    width: int
    turns: int

    def __call__(self, x: Tensor, cell: int = 1) -> Tensor:
        """x (B, C, h·cell, w·cell), cell 1 for latents, the factor for images. At its own size x is not touched."""
        size = (self.height * cell, self.width * cell)
        if size != tuple(x.shape[2:]):
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        return x.rot90(self.turns, (2, 3)) if self.turns else x


class LatentRegulariser(ABC):
    """What is asked of the latents beyond the autoencoder's own regularisation."""

    @abstractmethod
    def move(self, uniform: Tensor, cells: tuple[int, int], smallest: int) -> Move | None:
        """How latents and target of this step are moved, or None; uniform (3,) in [0, 1), sides >= smallest cells."""

    @abstractmethod
    def term(self, z: Tensor, images: Tensor) -> Tensor | None:
        """A loss per image (B,) on z (B, C, h, w), with its weight, or None."""


@dataclass(frozen=True, kw_only=True)
class Free(LatentRegulariser):
    """Nothing."""

    kind: Literal["free"] = "free"

    def move(self, uniform: Tensor, cells: tuple[int, int], smallest: int) -> Move | None:
        """None: nothing is moved."""
        return None

    def term(self, z: Tensor, images: Tensor) -> Tensor | None:
        """None: there is no loss."""
        return None


@dataclass(frozen=True, kw_only=True)
class Equivariance(LatentRegulariser):
    """EQ-VAE (Kouzelis et al. 2025, eq. 5): with `probability`, a step's losses compare D(τ∘z) with τ∘x.

    τ scales by k/h, k from least_scale·h to h, and turns by 0 to 3 quarters; one τ for all pictures of a step.
    """

    kind: Literal["equivariance"] = "equivariance"
    probability: float = 0.5
    least_scale: float = 0.25
    rotate: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1 or not 0 < self.least_scale <= 1:
            raise ValueError(
                "equivariance needs a probability in [0, 1] and a least_scale in (0, 1], "
                f"got {self.probability} and {self.least_scale}."
            )

    def move(self, uniform: Tensor, cells: tuple[int, int], smallest: int) -> Move | None:
        """τ of this step, or None with 1 − `probability`."""
        chance, size, turn = uniform.tolist()
        if chance >= self.probability:
            return None
        least = min(max(math.ceil(self.least_scale * min(cells)), smallest), min(cells))
        short = least + int(size * (min(cells) - least + 1))
        height, width = (round(side * short / min(cells)) for side in cells)
        return Move(height, width, int(4 * turn) if self.rotate else 0)

    def term(self, z: Tensor, images: Tensor) -> Tensor | None:
        """None: the reconstruction of what was moved is the loss."""
        return None


@dataclass(frozen=True, kw_only=True)
class Spectral(LatentRegulariser):
    """weight · mean_k (log P_z(k) − log P_x(k))², P the share of power in ring k of the spectrum of z and of the image
    averaged down to its size.

    Autoencoders put more power into high frequencies than pictures have, where diffusion spends its last, coarsest
    learned steps (Skorokhodov et al. 2025, section 3); here latents are held to the pictures' own spectrum.
    """

    kind: Literal["spectral"] = "spectral"
    weight: float = 0.01

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"the spectral regulariser's weight must be at least 0, got {self.weight}.")

    def move(self, uniform: Tensor, cells: tuple[int, int], smallest: int) -> Move | None:
        """None: nothing is moved."""
        return None

    def term(self, z: Tensor, images: Tensor) -> Tensor | None:
        """The weighted distance of both log spectra (B,)."""
        small = F.interpolate(images, tuple(z.shape[2:]), mode="area")
        distance: Tensor = (log_spectrum(z) - log_spectrum(small)).square().mean(1)
        return self.weight * distance


def log_spectrum(x: Tensor) -> Tensor:
    """Logarithm of the share of power in rings 1 ... min(h, w)/2 around frequency 0: (B, C, h, w) -> (B, rings).

    Ring k holds the frequencies whose length, in cycles per min(h, w) values, rounds to k; its power is the mean over
    them and over channels. Shares do not change with the scale or the mean of x. A side must be at least 2.
    """
    height, width = x.shape[2:]
    side = min(height, width)
    rows, columns = (torch.fft.fftfreq(n, device=x.device, dtype=torch.float32) * side for n in (height, width))
    ring = torch.hypot(rows[:, None], columns).round().long().flatten()
    power = torch.fft.fft2(x.float(), norm="ortho").abs().square().mean(1).flatten(1)
    count = side // 2
    sums = power.new_zeros(len(x), side + 1).index_add(1, ring, power)[:, 1 : count + 1]
    sizes = torch.bincount(ring, minlength=count + 1)[1 : count + 1]
    means = sums / sizes
    shares: Tensor = means / means.sum(1, keepdim=True).clamp_min(torch.finfo(means.dtype).tiny)
    return (shares + FLOOR).log()


@torch.no_grad()
def equivariance_error(model: Autoencoder, images: Tensor, move: Move) -> Tensor:
    """‖E(τx) − τE(x)‖² / ‖τE(x) − its mean‖² per image (B,), of mean latents: 0 for an encoder that commutes with τ."""
    moved = model.norm.mean_latents(model.encode(move(images, model.factor)))
    expected = move(model.norm.mean_latents(model.encode(images)))
    spread = (expected - expected.mean((2, 3), keepdim=True)).square().flatten(1).sum(1)
    return (moved - expected).square().flatten(1).sum(1) / spread


LATENT_REGULARISERS = (Free, Equivariance, Spectral)
