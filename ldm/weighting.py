"""How much each noise level counts in the loss. A new weighting is a class and an entry in `WEIGHTINGS`.

The loss is the mean square error of the network's target y. A weighting stated in the literature for the error of x0 or
of eps is carried over by `Diffusion.gains`, so that it means the same whatever the network predicts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion import Diffusion


class Weighting(ABC):
    """A factor per sample on the mean square error of y."""

    kind: str

    @abstractmethod
    def __call__(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        """Weights (B,) float64 at times t (B,)."""


@dataclass(frozen=True, kw_only=True)
class Uniform(Weighting):
    """1: the plain loss of whatever the network predicts."""

    kind: Literal["uniform"] = "uniform"

    def __call__(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class SNR(Weighting):
    """SNR on the error of x0, which is 1 on that of eps."""

    kind: Literal["snr"] = "snr"

    def __call__(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        return diffusion.gains(t)[1]


@dataclass(frozen=True, kw_only=True)
class MinSNR(Weighting):
    """min(SNR, gamma) on the error of x0. Hang et al. 2023 (arXiv 2303.09556), section 3.4."""

    kind: Literal["min-snr"] = "min-snr"
    gamma: float = 5.0

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ValueError(f"min-snr gamma must be positive, got {self.gamma}")

    def __call__(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        return diffusion.schedule.logsnr(t).exp().clamp(max=self.gamma) * diffusion.gains(t)[0]


WEIGHTINGS = (Uniform, SNR, MinSNR)
