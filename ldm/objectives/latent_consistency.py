"""Latent consistency models: the ends of a guided teacher's way, with the scale of guidance embedded.

Luo et al. 2023 (arXiv 2310.04378), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.diffusion import Denoised, Diffusion
from ldm.objectives.base import Beside, Companion
from ldm.objectives.self_consistency import Interval, SelfConsistent, SelfConsistentConfig, averaged
from ldm.schedules import NoiseSchedule, match


class LatentConsistency(SelfConsistent):
    """f at a time is held to what it is where a step of DDIM of the share `skip` of all times ends, at t_min the last.

    A time that is drawn stands for the end of the step that it falls into. The teacher guides by the extra
    "guidance_scale" of the condition where there is one, and student and average are told it.
    """

    config: LatentConsistencyConfig

    def interval(self, t: Tensor, beside: Beside) -> Interval:
        skip, least = self.config.skip, self.diffusion.schedule.t_min
        end = (t / skip - 1e-9).ceil() * skip
        return Interval(end.clamp(least, 1), (end - skip).clamp(min=least), torch.ones_like(t))


@dataclass(frozen=True, kw_only=True)
class LatentConsistencyConfig(SelfConsistentConfig, Checked):
    """Config of `LatentConsistency`: `skip` is 20 entries of a table of 1000. `huber` is c of each element's distance,
    `ema` what the average keeps at each step, 0 for none."""

    kind: Literal["lcm"] = "lcm"
    skip: float = 0.02
    huber: float = 0.001
    ema: float = 0.95
    taught = "yes"
    made = LatentConsistency
    limits: ClassVar = {"skip": "(0, 1]", "huber": "(0, inf)", "ema": "[0, 1)"}

    def companions(self) -> Mapping[str, Companion]:
        return averaged(self.ema)

    def distance(self, f: Tensor, goal: Tensor) -> Tensor:
        """The mean of sqrt(d^2 + c^2) - c over all elements, (B,) float32."""
        square = (f - goal).float().square()
        return (square / ((square + self.huber**2).sqrt() + self.huber)).flatten(1).mean(1)

    def reading(self, diffusion: Diffusion, x: Tensor, y: Tensor, t: Tensor) -> Denoised:
        """The pair of f = c_skip x + c_out x0: x at t_min, and the denoiser's x0 from the first entries on."""
        ends, (alpha, sigma) = diffusion.recover(x, y, t), diffusion.schedule(t)
        skip, out = boundary(diffusion.schedule, t)
        x0 = match(skip, x) * x + match(out, x) * ends.x0
        back = torch.where(sigma > 0, alpha / sigma, 0.0)  # only at t_min = 0 is there none, and x is x0
        return Denoised(x0, ends.eps - match(back, x) * (x0 - ends.x0))


def boundary(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) = (0.25 / ((10 i)^2 + 0.25), 10 i / sqrt((10 i)^2 + 0.25)) at the index i of a table, counted
    from t_min: 1 at the first entry, 2.5e-3 at the next."""
    far = 10 * schedule.steps * (t - schedule.t_min).clamp(min=0)
    return 0.25 / (far**2 + 0.25), far / (far**2 + 0.25).sqrt()


OBJECTIVES = (LatentConsistencyConfig,)
