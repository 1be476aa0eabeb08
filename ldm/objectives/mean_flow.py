"""MeanFlow: the average velocity between two times, learned from the instantaneous one by the identity that ties them.

Geng et al. 2025 (arXiv 2505.13447).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.conditioning import Cond
from ldm.diffusion import Denoised
from ldm.jumps import SPAN, averaged, noise_share, plainly
from ldm.noise import Noise
from ldm.objectives.base import ALONE, Beside, Draw, Losses, Trained
from ldm.objectives.derivative import How, along
from ldm.objectives.few_step import FewStep, FewStepConfig, unweighed
from ldm.schedules import match
from ldm.times import Places


class MeanFlow(FewStep):
    """||u(x_t, t, s) - (v - (w_t - w_s) du/dw)||^2, the bracket held constant, with u = eps - x0 of the jump's pair.

    w = sigma / (alpha + sigma) is the time of the flow that every process is (`ldm.jumps`); v is eps - x0 of the data
    and its noise, or of what the teacher answers; du/dw is the network's own derivative along v with s held (equations
    6 and 10). t and s are the larger and the smaller of two times of the training; all samples but a share of `apart`
    have s = t, where the target is v. The mean square error e counts e / (e + offset)^power, the divisor constant.
    """

    config: MeanFlowConfig

    def draw(self, x0: Tensor, noise: Noise, places: Places | None = None, seen: Tensor | None = None,
             cond: Cond | Sequence[str] | None = None) -> Draw:
        """See `FewStep.draw`; "s" (B,) is the second time, and the choice of both is undone."""
        drawn = super().draw(x0, noise, places, seen, cond)
        other, factor = self.times.draw(noise.uniform((), "r"), self.diffusion.schedule, seen)
        apart = noise.uniform((), "apart") < self.config.apart
        other, factor = torch.where(apart, other, drawn.t), torch.where(apart, factor, 1.0)
        return drawn._replace(t=torch.maximum(drawn.t, other), factor=drawn.factor * factor,
                              more={"s": torch.minimum(drawn.t, other)})

    def further(self, x0: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        return {}

    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw, beside: Beside = ALONE) -> Losses:
        t, s = draw.t, draw.more["s"]
        x_t = self.diffusion.perturb(x0, draw.eps, t)
        now = Denoised(x0, draw.eps) if beside.teacher is None else beside.teacher(x_t, t, cond)
        goal = self.goal(beside.bare or backbone, x_t, t, s, now, cond)
        ends, expected = self.jump(backbone, x_t, t, s, cond)
        error = self.error(ends, goal, t)
        return self.counted(error * (error.detach() + self.config.offset) ** -self.config.power, draw, expected)

    def goal(self, network: Trained, x_t: Tensor, t: Tensor, s: Tensor, now: Denoised, cond: Any) -> Denoised:
        """The pair that the jump from t to s should be, by this network's own derivative where x_t moves as `now`
        says."""
        schedule = self.diffusion.schedule
        student = self.student(lambda *asked: unweighed(network(*asked)))

        def average(x: Tensor, t: Tensor) -> Tensor:
            ends = student.jump(x, t, s, cond)
            return ends.eps - ends.x0

        (alpha, sigma), rates = schedule(t), schedule.rates(t)
        dx = match(rates.alpha, x_t) * now.x0 + match(rates.sigma, x_t) * now.eps
        _, slope = along(average, x_t, t, dx, self.config.derivative, self.config.step)
        # d/dw is d/dt over dw/dt.
        span = (noise_share(schedule, t) - noise_share(schedule, s)) * (alpha + sigma) ** 2
        return averaged(schedule, x_t, now.eps - now.x0
                        - match(span / (alpha * rates.sigma - sigma * rates.alpha), x_t) * slope, t)


@dataclass(frozen=True, kw_only=True)
class MeanFlowConfig(FewStepConfig, Checked):
    """Config of `MeanFlow`. `derivative` and `step`: `how` and `h` of `along`; differences on `edm`, whose networks
    read a logarithm of time, want a step of 0.01. `power` 0 is the plain square error: in few dimensions, where errors
    differ widely from sample to sample, a power moves what is learned away from the mean of the targets.
    """

    kind: Literal["meanflow"] = "meanflow"
    apart: float = 0.25
    power: float = 1.0
    offset: float = 1e-3
    derivative: How = "jvp"
    step: float = 3e-4
    reads = (SPAN,)
    taught = "either"
    reading = staticmethod(plainly)
    made = MeanFlow
    limits: ClassVar = {"apart": "[0, 1]", "power": "[0, inf)", "offset": "(0, inf)", "step": "(0, 0.1]"}


OBJECTIVES = (MeanFlowConfig,)
