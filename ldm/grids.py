"""Which times a sampler visits: steps + 1 of them, strictly decreasing to 0. A new grid is a class and an entry in `GRIDS`.

A grid starts at 1 but for `leading`, whose DDPM-table rule starts lower. Positions are float64 on the CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.schedules import NoiseSchedule


class Grid(ABC):
    """A rule for the times to visit, the same rule on any schedule."""

    kind: str

    @abstractmethod
    def __call__(self, steps: int, schedule: NoiseSchedule) -> Tensor:
        """(steps + 1,) float64 times. Raises ValueError when there is no such grid."""


def _fractions(steps: int) -> Tensor:
    """1 to 0 in equal steps."""
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, got {steps}")
    return torch.arange(steps, -1, -1, dtype=torch.float64) / steps


@dataclass(frozen=True, kw_only=True)
class Uniform(Grid):
    """t in equal steps, then moved towards noise: shift t / (1 + (shift - 1) t)."""

    kind: Literal["uniform"] = "uniform"
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"uniform shift must be positive, got {self.shift}")

    def __call__(self, steps: int, schedule: NoiseSchedule) -> Tensor:
        t = _fractions(steps)
        return self.shift * t / (1 + (self.shift - 1) * t)


@dataclass(frozen=True, kw_only=True)
class Quadratic(Grid):
    """sqrt(t) in equal steps. Song et al. 2021 (arXiv 2010.02502), appendix D.2."""

    kind: Literal["quadratic"] = "quadratic"

    def __call__(self, steps: int, schedule: NoiseSchedule) -> Tensor:
        return _fractions(steps) ** 2


def _levels(steps: int) -> Tensor:
    """1 to 0 in `steps` levels, ends included: the rules that add a last step to t = 0 themselves."""
    return _fractions(steps - 1) if steps > 1 else _fractions(steps)[:1]


def _through_sigmas(sigmas: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Times 1, ..., 0 at falling noise-to-signal ratios sigma / alpha, of which the first only stands for t = 1."""
    times = schedule.time(-2 * sigmas.log())
    return torch.cat([times.new_ones(1), times[1:], times.new_zeros(1)])


def _range(sigma_min: float, sigma_max: float, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """The asked range of sigma / alpha cut to the one where the network may be called."""
    t_min = torch.tensor(max(schedule.t_min, 1e-5), dtype=torch.float64)
    least, most = (-schedule.logsnr(torch.stack([t_min, torch.ones_like(t_min)])) / 2).exp().unbind()
    return least.clamp(min=sigma_min), most.clamp(max=sigma_max)


@dataclass(frozen=True, kw_only=True)
class Karras(Grid):
    """(sigma / alpha)^(1/rho) in equal steps from sigma_max to sigma_min, then 0.

    The range is cut to the schedule's own; the first time is always 1. Karras et al. 2022 (arXiv 2206.00364), eq. 5.
    """

    kind: Literal["karras"] = "karras"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max and self.rho > 0):
            raise ValueError(f"karras needs 0 < sigma_min < sigma_max and rho > 0, got {self.sigma_min}, "
                             f"{self.sigma_max} and {self.rho}")

    def __call__(self, steps: int, schedule: NoiseSchedule) -> Tensor:
        least, most = (end ** (1 / self.rho) for end in _range(self.sigma_min, self.sigma_max, schedule))
        return _through_sigmas((least + _levels(steps) * (most - least)) ** self.rho, schedule)


GRIDS = (Uniform, Quadratic, Karras)
