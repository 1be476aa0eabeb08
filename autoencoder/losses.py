"""Reconstruction and adversarial losses of stage one, each per image: (B, ...) -> (B,).

All are *means* over the values of an image (LDM sums them), so weights do not depend on the image size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _per_image(values: Tensor) -> Tensor:
    return values.float().flatten(1).mean(1)


class Reconstruction(ABC):
    """Distance of a reconstruction from its images."""

    @abstractmethod
    def __call__(self, x_hat: Tensor, images: Tensor) -> Tensor:
        """(B, C, H, W) twice -> (B,)."""


@dataclass(frozen=True, kw_only=True)
class L1(Reconstruction):
    """mean |x̂ − x|."""

    kind: Literal["l1"] = "l1"

    def __call__(self, x_hat: Tensor, images: Tensor) -> Tensor:
        return _per_image((x_hat - images).abs())


@dataclass(frozen=True, kw_only=True)
class L2(Reconstruction):
    """mean (x̂ − x)²."""

    kind: Literal["l2"] = "l2"

    def __call__(self, x_hat: Tensor, images: Tensor) -> Tensor:
        return _per_image((x_hat - images).square())


@dataclass(frozen=True, kw_only=True)
class Charbonnier(Reconstruction):
    """mean sqrt((x̂ − x)² + ε²) − ε: L1 with a smooth foot (Charbonnier et al. 1994)."""

    kind: Literal["charbonnier"] = "charbonnier"
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"charbonnier's epsilon must be positive, got {self.epsilon}.")

    def __call__(self, x_hat: Tensor, images: Tensor) -> Tensor:
        return _per_image(((x_hat - images).square() + self.epsilon**2).sqrt() - self.epsilon)


RECONSTRUCTIONS = (L1, L2, Charbonnier)


class LogVariance(nn.Module):
    """The learned s of loss·exp(−s) + s, the balance of reconstruction against all else (Dai and Wipf 2019; LDM).

    Its best value is the logarithm of the loss, from which on the reconstruction term counts as 1 however small it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, loss: Tensor) -> Tensor:
        """() -> (), differentiable in the loss and in s."""
        return loss * (-self.value).exp() + self.value


class Adversarial(ABC):
    """The two sides of an adversarial game on logits of being real."""

    @abstractmethod
    def generator(self, fake: Tensor) -> Tensor:
        """What the decoder minimises, from the logits of its reconstructions: (B, ...) -> (B,)."""

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """What the discriminator minimises, from logits of images and of detached reconstructions: (B, ...) twice ->
        (B,).
        """


@dataclass(frozen=True, kw_only=True)
class Hinge(Adversarial):
    """G: −fake; D: ½ [relu(1 − real) + relu(1 + fake)], the halved form of LDM (Lim and Ye 2017)."""

    kind: Literal["hinge"] = "hinge"

    def generator(self, fake: Tensor) -> Tensor:
        """Logits (B, ...) of fakes -> the decoder's loss (B,)."""
        return _per_image(-fake)

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Logits (B, ...) of both -> the discriminator's loss (B,)."""
        return 0.5 * (_per_image(F.relu(1 - real)) + _per_image(F.relu(1 + fake)))


@dataclass(frozen=True, kw_only=True)
class NonSaturating(Adversarial):
    """G: softplus(−fake) = −log sigmoid(fake); D: ½ [softplus(−real) + softplus(fake)] (Goodfellow et al. 2014,
    section 3).
    """

    kind: Literal["non-saturating"] = "non-saturating"

    def generator(self, fake: Tensor) -> Tensor:
        """Logits (B, ...) of fakes -> the decoder's loss (B,)."""
        return _per_image(F.softplus(-fake))

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Logits (B, ...) of both -> the discriminator's loss (B,)."""
        return 0.5 * (_per_image(F.softplus(-real)) + _per_image(F.softplus(fake)))


@dataclass(frozen=True, kw_only=True)
class LeastSquares(Adversarial):
    """G: (fake − 1)²; D: ½ [(real − 1)² + fake²] (Mao et al. 2017, eq. 9)."""

    kind: Literal["least-squares"] = "least-squares"

    def generator(self, fake: Tensor) -> Tensor:
        """Logits (B, ...) of fakes -> the decoder's loss (B,)."""
        return _per_image((fake - 1).square())

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Logits (B, ...) of both -> the discriminator's loss (B,)."""
        return 0.5 * (_per_image((real - 1).square()) + _per_image(fake.square()))


ADVERSARIALS = (Hinge, NonSaturating, LeastSquares)


def of_kind(family: Iterable[Any], kind: str) -> Any:
    """The member of RECONSTRUCTIONS or ADVERSARIALS that a config names."""
    return next(member for member in family if member.kind == kind)()
