"""Processes of bounded variance in continuous time: flow matching, its trigonometric sister, VP and sub-VP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ldm.schedules.base import Continuous, Level


@dataclass(frozen=True, kw_only=True)
class _ToNoise(Continuous):
    """The interpolants that end in pure noise, alpha(1) = 0, and whose network may be called down to t = 0."""

    pure_noise = True
    limits: ClassVar = {"t_min": "[0, 1)"}
    kind: str
    t_min: float = 1e-5

    def logsnr(self, t: Tensor) -> Tensor:
        alpha, sigma = self(t)
        return 2 * (alpha.log() - sigma.log())


@dataclass(frozen=True, kw_only=True)
class Flow(_ToNoise):
    """Rectified flow: alpha = 1 - t, sigma = t. Lipman et al. 2023 (arXiv 2210.02747); Liu et al. 2023 (arXiv
    2209.03003).

    The shift of time for larger images belongs to the times trained at and the grid visited (`shift` of `times` and
    `grids`), so that the same weights serve any of them.
    """

    kind: Literal["flow"] = "flow"

    def __call__(self, t: Tensor) -> Level:
        return Level(1 - t, t)

    def rates(self, t: Tensor) -> Level:
        return Level(-torch.ones_like(t), torch.ones_like(t))

    def time(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-logsnr / 2)


@dataclass(frozen=True, kw_only=True)
class GVP(_ToNoise):
    """The generalised variance-preserving interpolant: alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Albergo & Vanden-Eijnden 2023 (arXiv 2209.15571); SiT (arXiv 2401.08740), table 1.
    """

    kind: Literal["gvp"] = "gvp"

    def __call__(self, t: Tensor) -> Level:
        # The sine of the complement is exactly 0 at t = 1, where the cosine would leave 6e-17.
        return Level((math.pi / 2 * (1 - t)).sin(), (math.pi / 2 * t).sin())

    def rates(self, t: Tensor) -> Level:
        alpha, sigma = self(t)
        return Level(-math.pi / 2 * sigma, math.pi / 2 * alpha)

    def time(self, logsnr: Tensor) -> Tensor:
        return 2 / math.pi * (-logsnr / 2).exp().atan()


@dataclass(frozen=True, kw_only=True)
class _LinearBeta(Continuous):
    """The SDEs whose beta(t) rises linearly: alpha = exp(-b / 2), with b(t) the integral of beta up to t."""

    pure_noise = False
    limits: ClassVar = {"beta_min": "(0, beta_max)", "beta_max": "(0, inf)", "t_min": "(0, 1)"}
    kind: str
    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3

    def beta(self, t: Tensor) -> Tensor:
        """beta(t) = beta_min + (beta_max - beta_min) t."""
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2

    def _time(self, integral: Tensor) -> Tensor:
        """The root of `_integral`, written so that small integrals keep their digits."""
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * slope * integral).sqrt())


@dataclass(frozen=True, kw_only=True)
class VP(_LinearBeta):
    """The variance-preserving SDE: alpha = exp(-b(t) / 2), sigma = sqrt(1 - alpha^2).

    Song et al. 2021 (arXiv 2011.13456), appendix C.
    """

    kind: Literal["vp"] = "vp"

    def __call__(self, t: Tensor) -> Level:
        b = self._integral(t)
        return Level((-b / 2).exp(), (-(-b).expm1()).sqrt())

    def rates(self, t: Tensor) -> Level:
        alpha, sigma = self(t)
        return Level(-self.beta(t) / 2 * alpha, self.beta(t) / 2 * alpha**2 / sigma)

    def logsnr(self, t: Tensor) -> Tensor:
        return -self._integral(t).expm1().log()

    def time(self, logsnr: Tensor) -> Tensor:
        return self._time(softplus(-logsnr, threshold=700))


@dataclass(frozen=True, kw_only=True)
class SubVP(_LinearBeta):
    """The sub-VP SDE: alpha = exp(-b(t) / 2), sigma = 1 - alpha^2.

    Song et al. 2021 (arXiv 2011.13456), eq. 29.
    """

    kind: Literal["sub-vp"] = "sub-vp"

    def __call__(self, t: Tensor) -> Level:
        b = self._integral(t)
        return Level((-b / 2).exp(), -(-b).expm1())

    def rates(self, t: Tensor) -> Level:
        alpha, _ = self(t)
        return Level(-self.beta(t) / 2 * alpha, self.beta(t) * alpha**2)

    def logsnr(self, t: Tensor) -> Tensor:
        b = self._integral(t)
        return -b - 2 * (-(-b).expm1()).log()

    def time(self, logsnr: Tensor) -> Tensor:
        # sigma / alpha = (1 - alpha^2) / alpha = 2 sinh(b / 2), whose inverse keeps its digits at both ends.
        return self._time(2 * ((-logsnr / 2).exp() / 2).asinh())


SCHEDULES = (Flow, GVP, VP, SubVP)
