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


def shifted(t: Tensor, shift: float) -> Tensor:
    """shift t / (1 + (shift - 1) t): on `flow`, log-SNR less 2 ln(shift). Esser et al. 2024 (arXiv 2403.03206), eq.
    23."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True, kw_only=True)
class LogitNormal(TimeSampling):
    """logit(t) ~ N(mean, std^2), then `shifted` towards noise. Esser et al. 2024 (arXiv 2403.03206), eq. 19."""

    kind: Literal["logit-normal"] = "logit-normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not (self.std > 0 and self.shift > 0):
            raise ValueError(f"logit-normal std and shift must be positive, got {self.std} and {self.shift}")

    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        return schedule.trained(shifted(t, self.shift))


@dataclass(frozen=True, kw_only=True)
class Uniform(TimeSampling):
    """t uniform, then `shifted` towards noise; at shift 1 every entry of a DDPM table equally often."""

    kind: Literal["uniform"] = "uniform"
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"uniform shift must be positive, got {self.shift}")

    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return schedule.trained(shifted(u, self.shift))


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
