"""Processes of growing variance: alpha = 1 and sigma alone moves. VE and EDM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.schedules.base import Level, NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class Exploding(NoiseSchedule):
    """alpha = 1; the network is given x_t / sqrt(sigma^2 + sigma_data^2), which has unit variance."""

    pure_noise = False
    limits: ClassVar = {"sigma_min": "(0, sigma_max)", "sigma_max": "(0, inf)", "sigma_data": "(0, inf)",
                        "t_min": "(0, 1)"}
    kind: str
    sigma_min: float
    sigma_max: float
    sigma_data: float = 0.5

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def logsnr(self, t: Tensor) -> Tensor:
        return -2 * self(t).sigma.log()

    def trained(self, t: Tensor) -> Tensor:
        return t.clamp(self.t_min, 1)

    def input_scale(self, t: Tensor) -> Tensor:
        return (self(t).sigma ** 2 + self.sigma_data**2).rsqrt()


@dataclass(frozen=True, kw_only=True)
class VE(Exploding):
    """The variance-exploding SDE: sigma = sigma_min (sigma_max / sigma_min)^t for t > 0, and clean at t = 0.

    Song et al. 2021 (arXiv 2011.13456), appendix C. The network sees 1000 t.
    """

    kind: Literal["ve"] = "ve"
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5

    def __call__(self, t: Tensor) -> Level:
        sigma = self.sigma_min * (t * math.log(self.sigma_max / self.sigma_min)).exp()
        return Level(torch.ones_like(t), torch.where(t > 0, sigma, 0.0))

    def rates(self, t: Tensor) -> Level:
        return Level(torch.zeros_like(t), self(t).sigma * math.log(self.sigma_max / self.sigma_min))

    def time(self, logsnr: Tensor) -> Tensor:
        ratio = math.log(self.sigma_max / self.sigma_min)
        return ((-logsnr / 2 - math.log(self.sigma_min)) / ratio).clamp(min=0)

    def noise_level(self, t: Tensor) -> Tensor:
        return 1000 * t


@dataclass(frozen=True, kw_only=True)
class EDM(Exploding):
    """EDM's process: sigma = sigma_max t. The network sees ln(sigma) / 4.

    Karras et al. 2022 (arXiv 2206.00364), table 1.
    """

    kind: Literal["edm"] = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def t_min(self) -> float:
        return self.sigma_min / self.sigma_max

    def __call__(self, t: Tensor) -> Level:
        return Level(torch.ones_like(t), self.sigma_max * t)

    def rates(self, t: Tensor) -> Level:
        return Level(torch.zeros_like(t), torch.full_like(t, self.sigma_max))

    def time(self, logsnr: Tensor) -> Tensor:
        return (-logsnr / 2).exp() / self.sigma_max

    def noise_level(self, t: Tensor) -> Tensor:
        return (self.sigma_max * t).log() / 4


SCHEDULES = (VE, EDM)
