"""Consistency distillation and consistency training, between neighbours of N levels of noise.

Song et al. 2023 (arXiv 2303.01469), algorithms 2 and 3; Song & Dhariwal 2023 (arXiv 2310.14189).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ldm.diffusion import Denoised, Diffusion
from ldm.grids import Karras
from ldm.objectives.base import Beside, Companion
from ldm.objectives.self_consistency import (
    Interval,
    SelfConsistent,
    SelfConsistentConfig,
    at_ratio,
    averaged,
    bounded,
    mean_square,
    pseudo_huber,
    ratio,
)
from ldm.schedules import NoiseSchedule
from ldm.teacher import Teacher


class Consistency(SelfConsistent):
    """f at a level is held to what it is one level below: by a teacher's step from there, or with the same noise.

    The levels r = sigma / alpha have equal steps in r^(1 / rho), from sigma_min or that of t_min to sigma_max or that
    of t = 1. The time of the uppermost is always t = 1, also where alpha is 0 there and r infinite; its r in weights is
    sigma_max all the same. A time that is drawn stands for the upper level of the step that it falls into: each as
    often with the times `karras`, and as in iCT with `log-normal` ones of mean -1.1 and std 2. Raises ValueError where
    the schedule has no such levels.
    """

    config: LevelsConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        least, most = self.config.ends(self.diffusion.schedule)
        if not least < most:
            raise ValueError(f"objective.sigma_max {self.config.sigma_max:g} leaves no levels of noise on a schedule "
                             f"whose sigma / alpha begins at {least:g}: set it above that")

    def interval(self, t: Tensor, beside: Beside) -> Interval:
        schedule, config = self.diffusion.schedule, self.config
        (least, most), steps = config.ends(schedule), config.count(beside.step, beside.steps) - 1
        low, high = least ** (1 / config.rho), most ** (1 / config.rho)
        place = (ratio(schedule, t).clamp(least, most) ** (1 / config.rho) - low) / (high - low)
        upper = (place * steps - 1e-9).ceil().clamp(1, steps)  # rounding keeps a level at the end of its step
        rule, ends = Karras(rho=config.rho), (t.new_full((), least), t.new_full((), most))
        r, r_s = rule.ratios(upper / steps, *ends), rule.ratios((upper - 1) / steps, *ends)
        now = torch.where(upper == steps, 1.0, at_ratio(schedule, r))
        weight = 1 / (r - r_s) if config.weight == "interval" else torch.ones_like(r)
        return Interval(now, at_ratio(schedule, r_s), weight)


@dataclass(frozen=True, kw_only=True)
class LevelsConfig(SelfConsistentConfig):
    """Config of `Consistency`. `levels` N is reached after as many `doublings` of N - 1, at equal shares of the
    training; `ema` is the share of itself that the average keeps at each step, 0 for none.

    `weight`: "interval" is 1 / (r_(i + 1) - r_i), "uniform" 1. `metric`: the mean square, or `pseudo_huber` with
    c = `huber` sqrt(d). `sigma_data` is the standard deviation of the latents in f.
    """

    levels: int = 18
    doublings: int = 0
    metric: Literal["l2", "pseudo-huber"] = "l2"
    huber: float = 0.00054
    weight: Literal["uniform", "interval"] = "uniform"
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    ema: float = 0.0
    made = Consistency
    limits: ClassVar = {"levels": "[2, inf)", "doublings": "[0, inf)", "huber": "(0, inf)", "sigma_data": "(0, inf)",
                        "sigma_min": "(0, sigma_max)", "rho": "(0, inf)", "ema": "[0, 1)"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels - 1 < 2**self.doublings:
            raise ValueError(f"{self.kind} doublings: {self.levels} levels are reached by at most "
                             f"{(self.levels - 1).bit_length() - 1} doublings of 1, got {self.doublings}")

    def count(self, step: int, steps: int) -> int:
        """N at a step of the training: min(10 2^floor(k / K'), 1280) + 1 of iCT, with 1281 levels and 7 doublings."""
        share = max(steps // (self.doublings + 1), 1)
        return ((self.levels - 1) >> max(self.doublings - step // share, 0)) + 1

    def plan(self, step: int, steps: int) -> str:
        """The levels, where there come to be more."""
        return f"{self.count(step, steps)} levels of noise" if self.doublings else ""

    def ends(self, schedule: NoiseSchedule) -> tuple[float, float]:
        """The least and the largest level of sigma / alpha."""
        first, last = ratio(schedule, torch.tensor([schedule.t_min, 1], dtype=torch.float64)).tolist()
        return max(self.sigma_min, first), min(self.sigma_max, last)

    def reading(self, diffusion: Diffusion, x: Tensor, y: Tensor, t: Tensor) -> Denoised:
        """f as `bounded` has it."""
        return bounded(diffusion, x, y, t, self.ends(diffusion.schedule)[0], self.sigma_data)

    def distance(self, f: Tensor, goal: Tensor) -> Tensor:
        return mean_square(f, goal) if self.metric == "l2" else pseudo_huber(f, goal, self.huber)

    def companions(self) -> Mapping[str, Companion]:
        return averaged(self.ema)


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(LevelsConfig):
    """Consistency distillation: x at the level below is where one step of the teacher's ODE comes to, by `solver`."""

    kind: Literal["consistency"] = "consistency"
    solver: Literal["heun", "euler"] = "heun"
    ema: float = 0.95
    taught = "yes"

    def walked(self, teacher: Teacher, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor:
        return (teacher.heun if self.solver == "heun" else teacher.step)(x, t, s, cond)


@dataclass(frozen=True, kw_only=True)
class ConsistencyTrainingConfig(LevelsConfig):
    """Consistency training, from data alone, with the settings of iCT: x at the level below has the same noise."""

    kind: Literal["consistency-training"] = "consistency-training"
    levels: int = 1281
    doublings: int = 7
    metric: Literal["l2", "pseudo-huber"] = "pseudo-huber"
    weight: Literal["uniform", "interval"] = "interval"


OBJECTIVES = (ConsistencyConfig, ConsistencyTrainingConfig)
