"""Progressive distillation: one step of the student stands for two of its teacher's, and then again.

Salimans & Ho 2022 (arXiv 2202.00512), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.conditioning import Cond
from ldm.jumps import chord, mixed, plainly
from ldm.noise import Noise
from ldm.objectives.base import ALONE, Beside, Companion, Draw, Losses, Trained
from ldm.objectives.few_step import FewStep, FewStepConfig, need_teacher, unweighed

PREVIOUS = "previous"


class Progressive(FewStep):
    """||student(x_t) - y(x_t, x_s)||^2 with x_s from two DDIM steps of the one before it, t -> (t + s) / 2 -> s.

    The grid has N equal steps in t, N = `from_steps`, half of that, ... down to `steps`, each for an equal share of the
    training. The student of one N is the teacher of the next, and of the first N it is the model that is distilled.
    """

    config: ProgressiveConfig

    def further(self, x0: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        return {}

    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw, beside: Beside = ALONE) -> Losses:
        schedule, count = self.diffusion.schedule, self.config.count(beside.step, beside.steps)
        t = (draw.t * count).ceil().clamp(1, count) / count  # the end of the step that t falls into
        # Rounding of a table's times, and t_min, below which no network is asked.
        t, middle = schedule.trained(t), schedule.trained(t - 0.5 / count)
        s = torch.where(t * count > 1.5, schedule.trained((t - 1 / count).clamp(min=0)), 0.0)
        x_t = self.diffusion.perturb(x0, draw.eps, t)
        with torch.no_grad():
            if self.config.round(beside.step, beside.steps) == 0:
                teacher = need_teacher(beside, self.config.kind)
                x_s = teacher.step(teacher.step(x_t, t, middle, cond), middle, s, cond)
            else:
                before = self.student(lambda *asked: unweighed(beside.networks[PREVIOUS](*asked)))
                x_m = mixed(schedule, before(x_t, t, cond), middle)
                x_s = mixed(schedule, before(x_m, middle, cond), s)
        ends, expected = self.jump(backbone, x_t, t, s, cond)
        return self.counted(self.error(ends, chord(schedule, x_t, x_s, t, s), t), draw._replace(t=t), expected)


@dataclass(frozen=True, kw_only=True)
class ProgressiveConfig(FewStepConfig, Checked):
    """Config of `Progressive`: `from_steps` is `steps` times a power of two."""

    kind: Literal["progressive"] = "progressive"
    from_steps: int = 8
    steps: int = 1
    taught = "yes"
    aim = "next"
    reading = staticmethod(plainly)
    made = Progressive
    limits: ClassVar = {"steps": "[1, from_steps]", "from_steps": "[1, inf)"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.log2(self.from_steps / self.steps).is_integer():
            raise ValueError(f"progressive from_steps must be steps ({self.steps}) times a power of two, got "
                             f"{self.from_steps}")

    @property
    def rounds(self) -> int:
        """How many students there are, one after the other."""
        return round(math.log2(self.from_steps / self.steps)) + 1

    @property
    def drawn_in(self) -> tuple[int, ...]:
        """Those of the last student."""
        return (self.steps,)

    def round(self, step: int, steps: int) -> int:
        """Which of them learns at a step of the training; past its end, the last."""
        rounds: int = self.rounds
        return min(step * rounds // max(steps, 1), rounds - 1)

    def count(self, step: int, steps: int) -> int:
        """The steps that it takes from noise to data."""
        return self.from_steps >> self.round(step, steps)

    def plan(self, step: int, steps: int) -> str:
        """The student that learns."""
        return f"the student of {self.count(step, steps)} steps"

    def companions(self) -> Mapping[str, Companion]:
        def kept(step: int, steps: int) -> float:
            return float(self.round(step, steps) == self.round(step - 1, steps)) if step else 1.0

        return {PREVIOUS: Companion(kept)} if self.rounds > 1 else {}


OBJECTIVES = (ProgressiveConfig,)
