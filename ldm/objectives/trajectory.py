"""Consistency trajectory models: jumps between any two times of the teacher's way, learned from shorter ones.

Kim et al. 2023 (arXiv 2310.02279), without the adversarial loss that the paper adds to both losses here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.conditioning import Cond
from ldm.diffusion import Denoised
from ldm.jumps import SPAN, averaged, chord, mixed, noise_share, plainly, share_time
from ldm.noise import Noise
from ldm.objectives.base import ALONE, Beside, Companion, Draw, Losses, Trained
from ldm.objectives.few_step import FewStep, FewStepConfig, need_teacher, unweighed
from ldm.objectives.shortcut import TARGET, chosen
from ldm.schedules import match
from ldm.teacher import Teacher
from ldm.times import Places


class Trajectory(FewStep):
    """||student(x_t, t, s) - y(x_t, x_s)||^2 with x_s by the teacher's steps t -> u and an average's jump u -> s.

    A share `clean` of the jumps ends at s = 0; of others w_s / w_t is uniform, w = sigma / (alpha + sigma). u lies
    between s and t, at most `reach` of w below t, and the teacher takes `teacher_steps` steps equal in w to it. A share
    `denoising` of the samples teaches the answer at s = t, which is a denoiser's, from the teacher or from the data,
    and counts `weight` times: the paper's other loss, there of every sample and of data, whose guidance is none.

    The paper jumps on to time 0 from both its x_s and the target's, by the average, and measures their distance there
    with a network of features for pictures. Here both are compared at s, as the pairs that take x_t to them: latents
    have no such features, no gradient has to pass through the average, and the error of a jump is seen in full, where
    a further jump to 0 shrinks it.
    """

    config: TrajectoryConfig

    def draw(self, x0: Tensor, noise: Noise, places: Places | None = None, seen: Tensor | None = None,
             cond: Cond | Sequence[str] | None = None) -> Draw:
        """See `FewStep.draw`; "s" (B,) is where the jump goes, t itself where it denoises, and "u" (B,) until where the
        teacher does."""
        drawn, schedule = super().draw(x0, noise, places, seen, cond), self.diffusion.schedule
        share = noise_share(schedule, drawn.t)
        # A jump of nearly no length is the difference of two points that rounding does not tell apart.
        s = share_time(schedule, share * noise.uniform((), "s").clamp(max=0.999))
        s = torch.where(noise.uniform((), "clean") < self.config.clean, 0.0, s)
        far = (share - noise_share(schedule, s)).clamp(max=self.config.reach)
        u = schedule.trained(share_time(schedule, share - far * noise.uniform((), "u")))
        still = noise.uniform((), "denoising") < self.config.denoising
        return drawn._replace(more={"s": torch.where(still, drawn.t, s), "u": torch.where(still, drawn.t, u)})

    def further(self, x0: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        return {}

    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw, beside: Beside = ALONE) -> Losses:
        t, s, u, schedule = draw.t, draw.more["s"], draw.more["u"], self.diffusion.schedule
        teacher, still = need_teacher(beside, self.config.kind), draw.t == draw.more["s"]
        x_t = self.diffusion.perturb(x0, draw.eps, t)
        with torch.no_grad():
            now = Denoised(x0, draw.eps) if self.config.denoised == "data" else teacher(x_t, t, cond)
            below = torch.where(still, 0.0, s)  # any time below t: that pair is not used
            average = self.student(lambda *asked: unweighed(beside.networks[TARGET](*asked)))
            x_s = mixed(schedule, average.jump(self.walked(teacher, x_t, t, u, cond), u, below, cond), below)
            goal = chosen(still, now, chord(schedule, x_t, x_s, t, below))
        ends, expected = self.jump(backbone, x_t, t, s, cond)
        error = self.error(ends, goal, t)
        return self.counted(error * match(torch.where(still, self.config.weight, 1.0), error), draw, expected)

    def walked(self, teacher: Teacher, x: Tensor, t: Tensor, u: Tensor, cond: Cond) -> Tensor:
        """x at u, by the teacher's steps from t."""
        schedule, steps = self.diffusion.schedule, self.config.teacher_steps
        ends = noise_share(schedule, t), noise_share(schedule, u)
        for i in range(1, steps + 1):
            after = u if i == steps else schedule.trained(share_time(schedule, torch.lerp(*ends, i / steps)))
            x = heun(teacher, x, t, after, cond) if self.config.solver == "heun" else teacher.step(x, t, after, cond)
            t = after
        return x


def heun(teacher: Teacher, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """x at s >= t_min by Heun's method in w, the mean of eps - x0 at both ends: from pure noise, too, where in sigma /
    alpha (`Teacher.heun`) a step is infinitely long."""
    first = teacher(x, t, cond)
    last = teacher(mixed(teacher.schedule, first, s), s, cond)
    u = (first.eps - first.x0 + last.eps - last.x0) / 2
    return mixed(teacher.schedule, averaged(teacher.schedule, x, u, t), s)


@dataclass(frozen=True, kw_only=True)
class TrajectoryConfig(FewStepConfig, Checked):
    """Config of `Trajectory`: `ema` is what the average that is jumped with keeps at each step."""

    kind: Literal["ctm"] = "ctm"
    solver: Literal["heun", "ddim"] = "heun"
    teacher_steps: int = 2
    reach: float = 0.25
    clean: float = 0.25
    denoising: float = 0.25
    denoised: Literal["teacher", "data"] = "teacher"
    weight: float = 1.0
    ema: float = 0.999
    reads = (SPAN,)
    taught = "yes"
    reading = staticmethod(plainly)
    made = Trajectory
    limits: ClassVar = {"teacher_steps": "[1, inf)", "reach": "(0, 1]", "clean": "[0, 1]", "denoising": "[0, 1)",
                        "weight": "[0, inf)", "ema": "[0, 1)"}

    def companions(self) -> Mapping[str, Companion]:
        return {TARGET: Companion(lambda step, steps: self.ema)}


OBJECTIVES = (TrajectoryConfig,)
