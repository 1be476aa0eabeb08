"""Easy consistency tuning: from a model that denoises to one that is consistent, by times that come ever closer.

Geng et al. 2024 (arXiv 2406.14548).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ldm.jumps import plainly
from ldm.objectives.base import Beside
from ldm.objectives.self_consistency import (
    Interval,
    SelfConsistent,
    SelfConsistentConfig,
    at_ratio,
    pseudo_huber,
    ratio,
)


class EasyConsistency(SelfConsistent):
    """f at any time is held to what it is at the ratio sigma / alpha that `config.earlier` says, weighted by one over
    the way between both ratios.

    f is x0 of the denoiser, which is x at the clean end; ratios below that of t_min are the clean end. Ratios above
    sigma_max, and the infinite one of pure noise, are held to what is earlier than sigma_max.
    """

    config: EasyConsistencyConfig

    def interval(self, t: Tensor, beside: Beside) -> Interval:
        schedule, config = self.diffusion.schedule, self.config
        r = ratio(schedule, t).clamp(max=config.sigma_max)
        r_s = config.earlier(r, config.stage(beside.step, beside.steps))
        s = at_ratio(schedule, r_s.clamp(min=1e-300))
        clean = r_s <= ratio(schedule, t.new_full((), schedule.t_min))
        return Interval(t, s.where(~clean, 0.0), 1 / (r - r_s))


@dataclass(frozen=True, kw_only=True)
class EasyConsistencyConfig(SelfConsistentConfig):
    """Config of `EasyConsistency`: the stages n = 0, ..., `stages` - 1 are equal shares of the training.

    `huber` is c / sqrt(d) of `pseudo_huber`.
    """

    kind: Literal["ect"] = "ect"
    q: float = 2.0
    stages: int = 8
    huber: float = 0.00054
    sigma_max: float = 80.0
    taught = "either"
    reading = staticmethod(plainly)
    made = EasyConsistency
    limits: ClassVar = {"q": "(1, inf)", "stages": "[1, inf)", "huber": "(0, inf)", "sigma_max": "(0, inf)"}

    def stage(self, step: int, steps: int) -> int:
        """n at a step of the training; past its end, the last."""
        return min(step * self.stages // max(steps, 1), self.stages - 1)

    def plan(self, step: int, steps: int) -> str:
        """The stage."""
        return f"stage {self.stage(step, steps)} of how near both times are"

    def earlier(self, r: Tensor, n: int) -> Tensor:
        """r (1 - (1 + 8 sigmoid(-r)) / q^(n + 1)), not below 0: at q 2 and n 0 the loss is nearly that of denoising."""
        return r * (1 - (1 + 8 * (-r).sigmoid()) / self.q ** (n + 1)).clamp(min=0)

    def distance(self, f: Tensor, goal: Tensor) -> Tensor:
        return pseudo_huber(f, goal, self.huber)


OBJECTIVES = (EasyConsistencyConfig,)
