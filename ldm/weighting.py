"""How much each noise level counts in the loss. A new weighting is a class and an entry in `WEIGHTINGS`.

The loss is the mean square error of the network's target y. A weighting stated in the literature for the error of x0 or
of eps is carried over by `Diffusion.gains`, so that it means the same whatever the network predicts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.diffusion import Diffusion
from ldm.schedules import NoiseSchedule
from ldm.uncertainty import Uncertainty


class Weighting(Checked, ABC):
    """A factor per sample on the mean square error of y; with `terms`, divided by a loss that is learned."""

    terms: int = 0

    @abstractmethod
    def __call__(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        """Weights (B,) float64 at times t (B,)."""

    def build(self, schedule: NoiseSchedule) -> Uncertainty | None:
        """The module that learns how large the loss is at each noise level, from 1; None without `terms`."""
        return Uncertainty(schedule, self.terms) if self.terms else None


@dataclass(frozen=True, kw_only=True)
class UniformWeight(Weighting):
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
    limits: ClassVar = {"gamma": "(0, inf)"}

    def __call__(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        return diffusion.schedule.logsnr(t).exp().clamp(max=self.gamma) * diffusion.gains(t)[0]


@dataclass(frozen=True, kw_only=True)
class SoftMinSNR(Weighting):
    """SNR gamma / (SNR + gamma) on the error of x0. Crowson et al. 2024 (arXiv 2401.11605), section 4.5."""

    kind: Literal["soft-min-snr"] = "soft-min-snr"
    gamma: float = 4.0
    limits: ClassVar = {"gamma": "(0, inf)"}

    def __call__(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        # 1 / (1 / SNR + 1 / gamma), which is 0 and not 0 / 0 at pure noise.
        return diffusion.gains(t)[0] / ((-diffusion.schedule.logsnr(t)).exp() + 1 / self.gamma)


@dataclass(frozen=True, kw_only=True)
class ELBO(Weighting):
    """-d logsnr / dt / 2 on the error of eps: the variational bound in nats, for times drawn uniformly.

    Kingma et al. 2021 (arXiv 2107.00630), eq. 17. Written by determinants, since on `flow` the rate is infinite at 1.
    """

    kind: Literal["elbo"] = "elbo"

    def __call__(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        (alpha, sigma), rates = diffusion.schedule(t), diffusion.schedule.rates(t)
        # (alpha / det)^2 / (alpha sigma) = (alpha / det) / (sigma det), and both gains are known.
        of_x0, of_eps = diffusion.gains(t)
        return (alpha * rates.sigma - sigma * rates.alpha) * (of_x0 * of_eps).sqrt() / sigma**2


@dataclass(frozen=True, kw_only=True)
class P2(Weighting):
    """1 / (k + SNR)^gamma on the error of eps. Choi et al. 2022 (arXiv 2204.00227), eq. 8."""

    kind: Literal["p2"] = "p2"
    k: float = 1.0
    gamma: float = 1.0
    limits: ClassVar = {"k": "(0, inf)", "gamma": "[0, inf)"}

    def __call__(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        return diffusion.gains(t)[1] / (self.k + diffusion.schedule.logsnr(t).exp()) ** self.gamma


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Weighting):
    """sigmoid(bias - logsnr) on the error of eps. Kingma & Gao 2023 (arXiv 2303.00848); Hoogeboom et al. 2024
    (arXiv 2410.19324), eq. 6."""

    kind: Literal["sigmoid"] = "sigmoid"
    bias: float = -3.0

    def __call__(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        return torch.sigmoid(self.bias - diffusion.schedule.logsnr(t)) * diffusion.gains(t)[1]


@dataclass(frozen=True, kw_only=True)
class EDMWeight(Weighting):
    """SNR + 1 / sigma_data^2 on the error of x0, which is 1 on that of EDM's F. Karras et al. 2022 (arXiv 2206.00364),
    table 1."""

    kind: Literal["edm"] = "edm"
    sigma_data: float = 0.5
    limits: ClassVar = {"sigma_data": "(0, inf)"}

    def __call__(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        of_x0, of_eps = diffusion.gains(t)
        return of_x0 / self.sigma_data**2 + of_eps


@dataclass(frozen=True, kw_only=True)
class Learned(Weighting):
    """EDM's weight divided by the loss that a small module has learned to expect at each noise level, so that every
    level counts the same. Karras et al. 2024 (arXiv 2312.02696), eq. 14 and 15.

    The module is `build`'s: it belongs into the network that is trained, which then answers `Weighed`.
    """

    kind: Literal["learned"] = "learned"
    sigma_data: float = 0.5
    terms: int = 32
    limits: ClassVar = {"sigma_data": "(0, inf)", "terms": "(0, inf)"}

    def __call__(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        return EDMWeight(sigma_data=self.sigma_data)(diffusion, t)


WEIGHTINGS = (UniformWeight, SNR, MinSNR, SoftMinSNR, ELBO, P2, Sigmoid, EDMWeight, Learned)
