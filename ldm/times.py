"""Which noise levels are trained on: the distribution of t, as the inverse of its cumulative distribution.

Randomness stays outside: `sample` turns uniform numbers into times. A new distribution is a class and an entry in
`TIMES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.schedules import NoiseSchedule


class TimeSampling(ABC):
    """A distribution of training times on [t_min, 1]."""

    kind: str

    @abstractmethod
    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Times (B,) float64 at which a network may be called, from u (B,) uniform in (0, 1)."""


@dataclass(frozen=True, kw_only=True)
class Uniform(TimeSampling):
    """t uniform; on a DDPM table every entry equally often."""

    kind: Literal["uniform"] = "uniform"

    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return schedule.trained(u)


@dataclass(frozen=True, kw_only=True)
class LogitNormal(TimeSampling):
    """logit(t) ~ N(mean, std^2). Esser et al. 2024 (arXiv 2403.03206), eq. 19."""

    kind: Literal["logit-normal"] = "logit-normal"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"logit-normal std must be positive, got {self.std}")

    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return schedule.trained(torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)))


@dataclass(frozen=True, kw_only=True)
class LogNormal(TimeSampling):
    """ln(sigma / alpha) ~ N(mean, std^2). Karras et al. 2022 (arXiv 2206.00364), table 1: P_mean and P_std."""

    kind: Literal["log-normal"] = "log-normal"
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"log-normal std must be positive, got {self.std}")

    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        logsnr = -2 * (self.mean + self.std * torch.special.ndtri(u))
        return schedule.trained(schedule.time(logsnr).clamp(0, 1))


TIMES = (LogitNormal, Uniform, LogNormal)
