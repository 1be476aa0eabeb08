"""Guidance distillation: a student that answers in one call what its teacher answers in two, under guidance.

Meng et al. 2022 (arXiv 2210.03142), section 3.1, stage one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ldm.checks import Checked
from ldm.conditioning import Cond
from ldm.jumps import plainly
from ldm.noise import Noise
from ldm.objectives.base import ALONE, Beside, Draw, Losses, Trained
from ldm.objectives.few_step import FewStep, FewStepConfig, need_teacher


class GuidanceDistillation(FewStep):
    """||network(x_t) - y||^2 with y what the guided teacher answers to the same x_t, at a time of any level.

    The scale is that of the teacher's guidance or, where the condition has an extra "guidance_scale", one for each
    sample, which the student is told as well. Raises ValueError without a teacher.
    """

    config: GuidanceDistillationConfig

    def further(self, x0: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        return {}

    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw, beside: Beside = ALONE) -> Losses:
        error, expected = self.missed(backbone, self.diffusion.perturb(x0, draw.eps, draw.t), cond, draw.t, beside)
        return self.counted(error, draw, expected)

    def at(self, backbone: Trained, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor, beside: Beside = ALONE) -> Tensor:
        """How far the student's answer is from the teacher's, as in `losses`."""
        return self.missed(backbone, self.diffusion.perturb(x0, eps, t), cond, t, beside)[0]

    def missed(self, backbone: Trained, x_t: Tensor, cond: Cond, t: Tensor,
               beside: Beside) -> tuple[Tensor, Tensor | None]:
        """The square error of the answer at x_t (B,); and the logarithm of the expected loss, where that is learned."""
        goal = need_teacher(beside, self.config.kind)(x_t, t, cond)
        ends, expected = self.jump(backbone, x_t, t, t, cond)
        return self.error(ends, goal, t), expected


@dataclass(frozen=True, kw_only=True)
class GuidanceDistillationConfig(FewStepConfig, Checked):
    """Config of `GuidanceDistillation`, which has no key of its own."""

    kind: Literal["guidance"] = "guidance"
    taught = "yes"
    aim = "none"
    reading = staticmethod(plainly)
    made = GuidanceDistillation


OBJECTIVES = (GuidanceDistillationConfig,)
