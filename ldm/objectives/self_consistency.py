"""What consistency models share: f(x_t, t), where x_t ends, is to be what it is at an earlier time s on the same way.

The loss is weight distance(f(x_t, t), f-(x_s, s)), with f- free of gradient. x_s comes from a step of a teacher, or of
the sample and its noise themselves. Song et al. 2023 (arXiv 2303.01469).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.conditioning import Cond
from ldm.diffusion import Denoised, Diffusion
from ldm.noise import Noise
from ldm.objectives.base import ALONE, Beside, Companion, Draw, Losses, Trained
from ldm.objectives.few_step import FewStep, FewStepConfig, need_teacher
from ldm.predictions import EDMF
from ldm.schedules import NoiseSchedule, match
from ldm.teacher import Teacher

TARGET = "target"


class Interval(NamedTuple):
    """Times t and s < t that are held to the same f, s = 0 being the clean end, and how much they count: (B,)
    float64."""

    t: Tensor
    s: Tensor
    weight: Tensor


class SelfConsistent(FewStep):
    """weight distance(f(x_t, t), f-(x_s, s)) at the `interval` of a time that is drawn.

    f- is the network's running average where the config has that companion, else the network itself. Raises ValueError
    for a weighting, which counts errors of the prediction and not of f.
    """

    config: SelfConsistentConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting.kind != "uniform":
            raise ValueError(f"objective.kind {self.config.kind} counts how far the ends of two times are apart, by "
                             f"weights of its own: set weighting.kind to uniform instead of {self.weighting.kind}")

    def further(self, x0: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        return {}

    @abstractmethod
    def interval(self, t: Tensor, beside: Beside) -> Interval:
        """What is compared for times (B,) that were drawn."""

    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw, beside: Beside = ALONE) -> Losses:
        t, s, weight = self.interval(draw.t, beside)
        x_t = self.diffusion.perturb(x0, draw.eps, t)
        before = backbone if beside.bare is None else beside.bare
        if TARGET in self.config.companions():
            before = beside.networks[TARGET]
        with torch.no_grad():
            goal = self.clean(before, self.earlier(x0, x_t, t, s, cond, draw, beside), s, cond)
        error = self.config.distance(self.clean(backbone, x_t, t, cond), goal)
        return self.counted(match(weight, error) * error, draw._replace(t=t))

    def earlier(self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor, cond: Any, draw: Draw, beside: Beside) -> Tensor:
        """x at s: by a step of the teacher where one is learned from, else with the noise of x_t."""
        taught = self.config.taught
        if taught == "no" or (taught == "either" and beside.teacher is None):
            return self.diffusion.perturb(x0, draw.eps, s)
        return self.config.walked(need_teacher(beside, self.config.kind), x_t, t, s, cond)

    def clean(self, network: Trained, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """f(x, t): what a network says, and at the clean end t = 0 x itself."""
        ends, _ = self.jump(network, x, t.clamp(min=self.diffusion.schedule.t_min), torch.zeros_like(t), cond)
        return torch.where(match(t, x) > 0, ends.x0, x)


@dataclass(frozen=True, kw_only=True)
class SelfConsistentConfig(FewStepConfig, Checked):
    """Config of a `SelfConsistent`."""

    @abstractmethod
    def distance(self, f: Tensor, goal: Tensor) -> Tensor:
        """How far f (B, ...) is from where it should be, (B,) float32."""

    def walked(self, teacher: Teacher, x: Tensor, t: Tensor, s: Tensor, cond: Any) -> Tensor:
        """x at s by a step of the teacher: of DDIM, unless a member chooses."""
        return teacher.step(x, t, s, cond)


def averaged(ema: float) -> Mapping[str, Companion]:
    """The companion that keeps the share `ema` of itself at each step; none at 0."""
    return {TARGET: Companion(lambda step, steps: ema)} if ema else {}


def mean_square(f: Tensor, goal: Tensor) -> Tensor:
    """||f - goal||^2 / d, (B,) float32."""
    return (f - goal).float().square().flatten(1).mean(1)


def pseudo_huber(f: Tensor, goal: Tensor, per_root: float) -> Tensor:
    """(sqrt(||f - goal||^2 + c^2) - c) / sqrt(d), c = per_root sqrt(d), (B,) float32: of the mean square, as other
    losses are. Song & Dhariwal 2023 (arXiv 2310.14189), section 3.3."""
    square = mean_square(f, goal)
    return square / ((square + per_root**2).sqrt() + per_root)  # the difference of two roots, without cancellation


def ratio(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """r = sigma / alpha, infinite at pure noise."""
    alpha, sigma = schedule(t)
    return sigma / alpha


def at_ratio(schedule: NoiseSchedule, r: Tensor) -> Tensor:
    """The time in [t_min, 1] of sigma / alpha = r."""
    return schedule.time(-2 * r.log()).clamp(schedule.t_min, 1)


def bounded(diffusion: Diffusion, x: Tensor, y: Tensor, t: Tensor, least: float, sigma_data: float) -> Denoised:
    """The pair of f = c_skip x / alpha + c_out F, which is x / alpha at sigma / alpha <= `least` whatever F is.

    With S^2 = sigma^2 + alpha^2 sigma_data^2, gap = sigma - alpha least and G^2 = gap^2 + alpha^2 sigma_data^2:
    c_skip = alpha^2 sigma_data^2 / G^2, c_out = sigma_data gap / S, and F is EDM's, of the pair that the network
    predicts. Finite also at alpha = 0, where f = sigma_data F. Song et al. 2023 (arXiv 2303.01469), appendix C.
    """
    (alpha, sigma), ends = diffusion.schedule(t), diffusion.recover(x, y, t)
    a, b = EDMF(sigma_data=sigma_data).coefficients(diffusion.schedule(t), diffusion.schedule.rates(t))
    f = match(a, x) * ends.x0 + match(b, x) * ends.eps
    share = (1 - alpha * least / sigma).clamp(min=0) if least else torch.ones_like(sigma)  # gap / sigma
    gap, signal = sigma * share, alpha * sigma_data
    whole, root = gap**2 + signal**2, (sigma**2 + signal**2).sqrt()
    x0 = match(signal * sigma_data / whole, x) * x + match(sigma_data * gap / root, x) * f
    # (x - alpha x0) / sigma, written so that nothing is divided by sigma.
    return Denoised(x0, match(share * gap / whole, x) * x - match(share * signal / root, x) * f)
