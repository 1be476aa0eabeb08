"""The encoder's Gaussian posterior q(z | image), read from moments = mean ⊕ logvar."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)  # LDM's clamp: exp stays finite in float32


class Posterior(NamedTuple):
    """N(mean, exp(logvar)), diagonal; mean and logvar are (B, C, h, w), natural logarithm."""

    mean: Tensor
    logvar: Tensor

    @staticmethod
    def split(moments: Tensor) -> Posterior:
        """Halve moments (B, 2C, h, w) along the channels and clamp logvar to [-30, 20]."""
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE))

    def sample(self, noise: Tensor) -> Tensor:
        """z = mean + exp(logvar / 2)·noise with noise ~ N(0, I) of the shape of mean."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def kl(self) -> Tensor:
        """KL(q ‖ N(0, I)) = ½ Σ (mean² + var − 1 − logvar) in nats, *summed* over (C, h, w): one number per image.

        LDM's weight 1e-6 multiplies this sum (averaged over the batch) next to a reconstruction loss also *summed*
        over the pixels; beside a loss averaged over the C·H·W image values, the same balance is 1e-6 / (C·H·W).
        """
        terms = self.mean.square() + torch.expm1(self.logvar) - self.logvar
        return 0.5 * terms.flatten(1).sum(1)
