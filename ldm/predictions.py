"""What the network is asked for: a target y = a x0 + b eps, named by its pair of coefficients (a, b).

With x_t = alpha x0 + sigma eps, any such y gives both ends back unless alpha b = sigma a, and conversion between
predictions is the same two lines for all of them. A new prediction is a class and an entry in `PREDICTIONS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.schedules import Level, NoiseSchedule

_NO_X0 = "cannot tell x0 from pure noise: this schedule has alpha(1) = 0; use v, velocity, x0 or edm"
_NO_EPS = "cannot tell eps from a clean sample: this schedule has t_min = 0; give it more, or use v, velocity or edm"


class Prediction(Checked, ABC):
    """The coefficients of the target, and where on a schedule they do not determine both ends.

    `blind_to_x0`: at pure noise (alpha = 0); `blind_to_eps`: on a clean sample (sigma = 0).
    """

    blind_to_x0: ClassVar[bool] = False
    blind_to_eps: ClassVar[bool] = False

    @abstractmethod
    def coefficients(self, level: Level, rates: Level) -> tuple[Tensor, Tensor]:
        """(a, b) of y = a x0 + b eps, float64, of the shape of t. `rates` are d alpha / dt and d sigma / dt."""

    def refusal(self, schedule: NoiseSchedule) -> str | None:
        """Why the pair is singular somewhere on [t_min, 1], or None; judged by what the schedule declares."""
        if self.blind_to_x0 and schedule.pure_noise:
            return _NO_X0
        return _NO_EPS if self.blind_to_eps and schedule.t_min == 0 else None


@dataclass(frozen=True, kw_only=True)
class Eps(Prediction):
    """y = eps. Ho et al. 2020 (arXiv 2006.11239), eq. 14."""

    kind: Literal["eps"] = "eps"
    blind_to_x0 = True

    def coefficients(self, level: Level, rates: Level) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(level.alpha), torch.ones_like(level.alpha)


@dataclass(frozen=True, kw_only=True)
class X0(Prediction):
    """y = x0."""

    kind: Literal["x0"] = "x0"
    blind_to_eps = True

    def coefficients(self, level: Level, rates: Level) -> tuple[Tensor, Tensor]:
        return torch.ones_like(level.alpha), torch.zeros_like(level.alpha)


@dataclass(frozen=True, kw_only=True)
class V(Prediction):
    """y = alpha eps - sigma x0. Salimans & Ho 2022 (arXiv 2202.00512), appendix D."""

    kind: Literal["v"] = "v"

    def coefficients(self, level: Level, rates: Level) -> tuple[Tensor, Tensor]:
        return -level.sigma, level.alpha


@dataclass(frozen=True, kw_only=True)
class Velocity(Prediction):
    """y = dx_t/dt = alpha' x0 + sigma' eps; eps - x0 on `flow`. Lipman et al. 2023 (arXiv 2210.02747)."""

    kind: Literal["velocity"] = "velocity"

    def coefficients(self, level: Level, rates: Level) -> tuple[Tensor, Tensor]:
        return rates.alpha, rates.sigma


@dataclass(frozen=True, kw_only=True)
class Score(Prediction):
    """y = grad log p(x_t) = -eps / sigma. Song et al. 2021 (arXiv 2011.13456)."""

    kind: Literal["score"] = "score"
    blind_to_x0 = blind_to_eps = True

    def coefficients(self, level: Level, rates: Level) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(level.alpha), -1 / level.sigma


@dataclass(frozen=True, kw_only=True)
class EDMF(Prediction):
    """EDM's F = (x0 - c_skip x) / c_out, for x = x_t / alpha at noise sigma / alpha.

    Written out, the divisions by c_out cancel and F is finite from sigma = 0 to alpha = 0:
    F = (sigma / sigma_data x0 - alpha sigma_data eps) / sqrt(sigma^2 + alpha^2 sigma_data^2).
    At sigma_data = 1 on a variance-preserving process it is -v. Karras et al. 2022 (arXiv 2206.00364), eq. 7 and 8.
    """

    kind: Literal["edm"] = "edm"
    sigma_data: float = 0.5
    limits: ClassVar = {"sigma_data": "(0, inf)"}

    def coefficients(self, level: Level, rates: Level) -> tuple[Tensor, Tensor]:
        alpha, sigma = level
        scale = (sigma**2 + (alpha * self.sigma_data) ** 2).rsqrt()
        return sigma * scale / self.sigma_data, -alpha * scale * self.sigma_data


PREDICTIONS = (Velocity, Eps, X0, V, Score, EDMF)
