"""Shortcut models: one step of a size stands for two of half that size, and the smallest is an ordinary denoiser's.

Frans et al. 2024 (arXiv 2410.12557).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.conditioning import Cond
from ldm.diffusion import Denoised
from ldm.jumps import SPAN, chord, mixed, noise_share, plainly, share_time
from ldm.noise import Noise
from ldm.objectives.base import ALONE, Beside, Companion, Draw, Losses, Trained
from ldm.objectives.few_step import FewStep, FewStepConfig, unweighed
from ldm.times import Places

TARGET = "target"


class Shortcut(FewStep):
    """||student(x_t, t, s) - y(x_t, x_s)||^2 with x_s from two jumps of an average of it, t -> m -> s, m half way.

    Sizes w_t - w_s are 1, 1/2, ..., 2 / `steps` of the noise share of t = 1, any of them as often, and w_t a multiple
    of the size. Halves of the smallest are asked for at span 0, as plain steps of a denoiser, so that a perfect student
    of one step lands where Euler's method in w does in `steps`. All samples but a share of `bootstrap` teach just that
    answer at s = t, from the data or from the teacher's.
    """

    config: ShortcutConfig

    def draw(self, x0: Tensor, noise: Noise, places: Places | None = None, seen: Tensor | None = None,
             cond: Cond | Sequence[str] | None = None) -> Draw:
        """See `FewStep.draw`; "s" (B,) is where the jump goes, "count" (B,) how many of its size there are, 0 at s = t.
        """
        drawn, schedule = super().draw(x0, noise, places, seen, cond), self.diffusion.schedule
        jumps = noise.uniform((), "bootstrap") < self.config.bootstrap
        count = 2 ** (noise.uniform((), "size") * math.log2(self.config.steps)).floor()
        place, whole = (noise.uniform((), "place") * count).floor(), noise_share(schedule, torch.ones_like(count))
        t = schedule.trained(share_time(schedule, (place + 1) / count * whole))
        s = share_time(schedule, place / count * whole)
        return drawn._replace(t=torch.where(jumps, t, drawn.t), factor=torch.where(jumps, 1.0, drawn.factor),
                              more={"s": torch.where(jumps, s, drawn.t), "count": torch.where(jumps, count, 0.0)})

    def further(self, x0: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        return {}

    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw, beside: Beside = ALONE) -> Losses:
        t, s, count = draw.t, draw.more["s"], draw.more["count"]
        x_t = self.diffusion.perturb(x0, draw.eps, t)
        with torch.no_grad():
            now = Denoised(x0, draw.eps) if beside.teacher is None else beside.teacher(x_t, t, cond)
            # Where nothing jumps any s below t will do: that pair is not used.
            halves = self.halves(beside.networks[TARGET], x_t, t, torch.where(count > 0, s, 0.0), count, cond)
            goal = chosen(count > 0, halves, now)
        ends, expected = self.jump(backbone, x_t, t, s, cond)
        return self.counted(self.error(ends, goal, t), draw, expected)

    def halves(self, network: Trained, x_t: Tensor, t: Tensor, s: Tensor, count: Tensor, cond: Any) -> Denoised:
        """The pair of two jumps of a network, each half as long as that from t to s < t."""
        schedule, student = self.diffusion.schedule, self.student(lambda *asked: unweighed(network(*asked)))
        share = (noise_share(schedule, t) + noise_share(schedule, s)) / 2
        m, plain = schedule.trained(share_time(schedule, share)), count * 2 == self.config.steps
        x_m = mixed(schedule, student.jump(x_t, t, torch.where(plain, t, m), cond), m)
        x_s = mixed(schedule, student.jump(x_m, m, torch.where(plain, m, s), cond), s)
        return chord(schedule, x_t, x_s, t, s)


def chosen(which: Tensor, one: Denoised, other: Denoised) -> Denoised:
    """The one pair where `which` (B,) says so, and else the other."""
    places = which.to(one.x0.device).view(-1, *[1] * (one.x0.ndim - 1))
    return Denoised(torch.where(places, one.x0, other.x0), torch.where(places, one.eps, other.eps))


@dataclass(frozen=True, kw_only=True)
class ShortcutConfig(FewStepConfig, Checked):
    """Config of `Shortcut`: `steps` is a power of two, `ema` what the average that is jumped with keeps at each step.
    """

    kind: Literal["shortcut"] = "shortcut"
    steps: int = 128
    bootstrap: float = 0.25
    ema: float = 0.999
    reads = (SPAN,)
    taught = "either"
    reading = staticmethod(plainly)
    made = Shortcut
    limits: ClassVar = {"steps": "[2, inf)", "bootstrap": "(0, 1)", "ema": "[0, 1)"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.log2(self.steps).is_integer():
            raise ValueError(f"shortcut steps must be a power of two, got {self.steps}")

    def companions(self) -> Mapping[str, Companion]:
        return {TARGET: Companion(lambda step, steps: self.ema)}


OBJECTIVES = (ShortcutConfig,)
