"""Which times a sampler visits: 1 = t_0 > t_1 > ... > t_N = 0, in equal steps of t, of a power or the logarithm of
sigma / alpha, or of the index of a DDPM table. A new grid is a class and an entry in `GRIDS`.

A grid starts at 1 but for `leading`, whose DDPM-table rule starts lower, and `given`. Positions are float64 on the CPU.
One that a schedule cannot have is refused: each answer falls strictly.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.schedules import NoiseSchedule
from ldm.times import shifted


class Grid(Checked, ABC):
    """A rule for the times to visit, the same rule on any schedule."""

    def __call__(self, steps: int, schedule: NoiseSchedule) -> Tensor:
        """(steps + 1,) float64 times. Raises ValueError when there is no such grid."""
        if steps < 1:
            raise ValueError(f"sampling needs at least 1 step, got {steps}")
        times = self.visits(steps, schedule)
        if not bool((times.diff() < 0).all()):
            raise ValueError(f"{self.kind} has no {steps} steps that fall strictly on this schedule: some of its times "
                             "are the same in float64, or none; ask for fewer steps or milder settings of the grid")
        return times

    @abstractmethod
    def visits(self, steps: int, schedule: NoiseSchedule) -> Tensor:
        """The times of at least 1 step. Raises ValueError where the schedule cannot have them."""


def _fractions(steps: int) -> Tensor:
    """1 to 0 in equal steps."""
    return torch.arange(steps, -1, -1, dtype=torch.float64) / steps


def _callable(times: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The times, the last of them spread out at multiples of t_min where they fall below the network's range."""
    steps = len(times) - 1
    if steps * schedule.t_min > 1 + 1e-9:
        most = int(1 / schedule.t_min + 1e-9)
        raise ValueError(f"a schedule with t_min = {schedule.t_min:g} has grids of at most {most} steps, got {steps}")
    return times.maximum(_fractions(steps) * (steps * schedule.t_min))


@dataclass(frozen=True, kw_only=True)
class Uniform(Grid):
    """t in equal steps, then `shifted` towards noise as in `ldm.times`."""

    limits: ClassVar = {"shift": "(0, inf)"}
    kind: Literal["uniform"] = "uniform"
    shift: float = 1.0

    def visits(self, steps: int, schedule: NoiseSchedule) -> Tensor:
        return _callable(shifted(_fractions(steps), self.shift, schedule), schedule)


@dataclass(frozen=True, kw_only=True)
class Quadratic(Grid):
    """sqrt(t) in equal steps. Song et al. 2021 (arXiv 2010.02502), appendix D.2."""

    kind: Literal["quadratic"] = "quadratic"

    def visits(self, steps: int, schedule: NoiseSchedule) -> Tensor:
        return _callable(_fractions(steps) ** 2, schedule)


def _levels(steps: int) -> Tensor:
    """1 to 0 in `steps` levels, ends included: the rules that add a last step to t = 0 themselves."""
    return _fractions(steps - 1) if steps > 1 else _fractions(steps)[:1]


def _range(least: float | Tensor, most: float | Tensor) -> str:
    """A range of sigma / alpha, as such and in log-SNR."""
    return f"{least:g} to {most:g} (log-SNR {-2 * math.log(most):g} to {-2 * math.log(least):g})"


@dataclass(frozen=True, kw_only=True)
class Ratios(Grid):
    """Noise-to-signal ratios sigma / alpha that fall from sigma_max to sigma_min, then t = 0.

    The range is cut to the one where the network may be called; the first time is always 1.
    """

    limits: ClassVar = {"sigma_min": "(0, sigma_max)", "rho": "(0, inf)"}
    kind: str
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 1.0

    @abstractmethod
    def ratios(self, levels: Tensor, least: Tensor, most: Tensor) -> Tensor:
        """sigma / alpha at `levels` that fall from 1, the greatest, to 0, the least."""

    def visits(self, steps: int, schedule: NoiseSchedule) -> Tensor:
        ends = torch.tensor([max(schedule.t_min, 1e-5), 1], dtype=torch.float64)
        low, high = (-schedule.logsnr(ends) / 2).exp().unbind()
        least, most = low.clamp(min=self.sigma_min), high.clamp(max=self.sigma_max)
        if not least < most:
            raise ValueError(f"the grid's range of sigma / alpha, {_range(self.sigma_min, self.sigma_max)}, lies "
                             f"outside the schedule's, {_range(low, high)}; choose one that meets it")
        ratios = self.ratios(_levels(steps), least, most)
        times = schedule.time(-2 * ratios.log())
        return torch.cat([times.new_ones(1), times[1:], times.new_zeros(1)])


@dataclass(frozen=True, kw_only=True)
class Karras(Ratios):
    """(sigma / alpha)^(1/rho) in equal steps from sigma_max to sigma_min, then 0. Karras et al. 2022 (arXiv
    2206.00364), eq. 5."""

    kind: Literal["karras"] = "karras"
    rho: float = 7.0

    def ratios(self, levels: Tensor, least: Tensor, most: Tensor) -> Tensor:
        least, most = least ** (1 / self.rho), most ** (1 / self.rho)
        return (least + levels * (most - least)) ** self.rho


@dataclass(frozen=True, kw_only=True)
class Exponential(Ratios):
    """ln(sigma / alpha) falling from that of sigma_max to that of sigma_min as ramp^rho, then t = 0.

    rho 1 is the exponential grid, any other the poly-exponential one of k-diffusion.
    """

    kind: Literal["exponential"] = "exponential"

    def ratios(self, levels: Tensor, least: Tensor, most: Tensor) -> Tensor:
        return (least.log() + levels**self.rho * (most.log() - least.log())).exp()


@dataclass(frozen=True, kw_only=True)
class UniformLogSNR(Grid):
    """log-SNR in equal steps from logsnr_min to logsnr_max, then t = 0: DPM-Solver's own grid. Lu et al. 2022 (arXiv
    2206.00927), section 3.3."""

    # Beyond 1400, sigma / alpha is no float64.
    limits: ClassVar = {"logsnr_min": "[-1400, logsnr_max)", "logsnr_max": "(logsnr_min, 1400]"}
    kind: Literal["uniform-logsnr"] = "uniform-logsnr"
    logsnr_min: float = -10.0
    logsnr_max: float = 10.0

    def visits(self, steps: int, schedule: NoiseSchedule) -> Tensor:
        least, most = math.exp(-self.logsnr_max / 2), math.exp(-self.logsnr_min / 2)
        return Exponential(sigma_min=least, sigma_max=most).visits(steps, schedule)


class Entries(Grid):
    """Some entries of a DDPM table, as indices i at t = (i + 1) / T, then t = 0; of 1000 on a continuous schedule."""

    @abstractmethod
    def indices(self, steps: int, total: int) -> Tensor:
        """The falling indices (steps,) of a table of `total` entries, float64."""

    def visits(self, steps: int, schedule: NoiseSchedule) -> Tensor:
        total = schedule.steps
        if steps > total:
            raise ValueError(f"a table of {total} entries has grids of 1 to {total} steps, got {steps}; ask for fewer")
        return torch.cat([self.indices(steps, total) + 1, torch.zeros(1, dtype=torch.float64)]) / total


@dataclass(frozen=True, kw_only=True)
class Leading(Entries):
    """Table entries k (T // steps) + offset: DDIM's own choice, which never visits the noisiest entries.

    offset 1 is Stable Diffusion's. Lin et al. 2023 (arXiv 2305.08891), table 2.
    """

    limits: ClassVar = {"offset": "[0, 1]"}
    kind: Literal["leading"] = "leading"
    offset: int = 0

    def indices(self, steps: int, total: int) -> Tensor:
        if (steps - 1) * (total // steps) + self.offset >= total:
            raise ValueError(f"leading offset {self.offset} leaves a table of {total} entries {total - self.offset} "
                             f"steps, got {steps}; ask for fewer, or for offset 0")
        return torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (total // steps) + self.offset


@dataclass(frozen=True, kw_only=True)
class Linspace(Entries):
    """Table entries from T - 1 to 0 in equal, rounded steps. Lin et al. 2023 (arXiv 2305.08891), table 2."""

    kind: Literal["linspace"] = "linspace"

    def indices(self, steps: int, total: int) -> Tensor:
        return (_levels(steps) * (total - 1)).round()


@dataclass(frozen=True, kw_only=True)
class Trailing(Entries):
    """Table entries T - 1, T - 1 - T / steps, ..., rounded. Lin et al. 2023 (arXiv 2305.08891), table 2."""

    kind: Literal["trailing"] = "trailing"

    def indices(self, steps: int, total: int) -> Tensor:
        return (total - torch.arange(steps, dtype=torch.float64) * (total / steps)).round() - 1


@dataclass(frozen=True, kw_only=True)
class Given(Grid):
    """The times of a list, falling to 0: one more of them than steps."""

    kind: Literal["given"] = "given"
    times: tuple[float, ...] = (1.0, 0.0)

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in pairwise(self.times))
        if len(self.times) < 2 or self.times[0] > 1 or self.times[-1] != 0 or not falling:
            raise ValueError(f"given times must fall strictly from at most 1 to exactly 0, got {self.times}")

    def visits(self, steps: int, schedule: NoiseSchedule) -> Tensor:
        if steps != len(self.times) - 1:
            raise ValueError(f"{len(self.times)} given times make {len(self.times) - 1} steps, got steps = {steps}")
        if self.times[-2] < schedule.t_min * (1 - 1e-9):
            raise ValueError(f"given times above 0 must be at least this schedule's t_min = {schedule.t_min:g}, where "
                             f"the network may be called, got {self.times[-2]:g}")
        return torch.tensor(self.times, dtype=torch.float64)


GRIDS = (Uniform, Quadratic, Karras, Exponential, UniformLogSNR, Leading, Linspace, Trailing, Given)
