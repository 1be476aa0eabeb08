"""Explicit Runge-Kutta solvers of the probability-flow ODE dx/dt = alpha' x0 + sigma' eps.

The same ODE has different numerical answers in different variables, so each solver names its own. In a variable w with
z = x / c the ODE reads dz/dw = p x0 + q eps:

    flow   w = sigma / (alpha + sigma)   c = alpha + sigma   dz/dw = eps - x0         finite at both ends of any process
    sigma  w = sigma / alpha             c = alpha           dz/dw = eps              EDM's and k-diffusion's
    t      w = t                         c = 1               dz/dw = alpha' x0 + sigma' eps

On `flow` the first is t itself, on `edm` the second is t but for a factor. A step over an end where the variable is
infinite, and one whose inner stages would call the network below t_min, falls back to a simpler tableau.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.diffusion import Denoised
from ldm.noise import Noise
from ldm.samplers.base import Memory, Sampler, mix
from ldm.schedules import NoiseSchedule


class _Variable(ABC):
    @abstractmethod
    def place(self, schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
        """(w, c) at t."""

    @abstractmethod
    def time(self, schedule: NoiseSchedule, w: Tensor) -> Tensor:
        """The t at which the variable is w."""

    @abstractmethod
    def slope(self, schedule: NoiseSchedule, t: Tensor, ends: Denoised) -> Tensor:
        """dz/dw."""


class _FlowTime(_Variable):
    def place(self, schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule(t)
        return sigma / (alpha + sigma), alpha + sigma

    def time(self, schedule: NoiseSchedule, w: Tensor) -> Tensor:
        return schedule.time(2 * ((1 - w).log() - w.log()))

    def slope(self, schedule: NoiseSchedule, t: Tensor, ends: Denoised) -> Tensor:
        return ends.eps - ends.x0


class _Ratio(_Variable):
    def place(self, schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule(t)
        return sigma / alpha, alpha

    def time(self, schedule: NoiseSchedule, w: Tensor) -> Tensor:
        return schedule.time(-2 * w.log())

    def slope(self, schedule: NoiseSchedule, t: Tensor, ends: Denoised) -> Tensor:
        return ends.eps


class _OwnTime(_Variable):
    def place(self, schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
        return t, torch.ones_like(t)

    def time(self, schedule: NoiseSchedule, w: Tensor) -> Tensor:
        return w

    def slope(self, schedule: NoiseSchedule, t: Tensor, ends: Denoised) -> Tensor:
        return mix(schedule.rates(t), ends)


VARIABLES: dict[str, _Variable] = {"flow": _FlowTime(), "sigma": _Ratio(), "t": _OwnTime()}


class Tableau(NamedTuple):
    """Butcher's: stage i is taken at node i from the slopes before it, weighted by row i; `weights` end the step."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


EULER = Tableau((0,), ((),), (1,))
MIDPOINT = Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1))
HEUN = Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2))
HEUN3 = Tableau((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4))
CLASSIC = Tableau((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


class RungeKutta(Sampler):
    """x_s = c_s (x / c_t + (w_s - w_t) sum_i b_i dz/dw_i), by the first tableau whose stages the network may be called
    at. Raises ValueError on an unknown variable."""

    rises = True
    variable: str
    tableaux: ClassVar[tuple[Tableau, ...]]

    def __post_init__(self) -> None:
        if self.variable not in VARIABLES:
            raise ValueError(f"{self.kind} variable must be one of {', '.join(VARIABLES)}, got {self.variable!r}")

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory,
             noise: Noise) -> tuple[Tensor, Memory]:
        variable, schedule = VARIABLES[self.variable], denoise.schedule
        (start, scale), (end, _) = variable.place(schedule, t), variable.place(schedule, s)
        if not bool(start.isfinite() & end.isfinite()):
            return mix(schedule(s), denoise(x, t)), None
        tableau, times = self._fitting(schedule, variable, t, s, start, end)
        slopes: list[Tensor] = []
        for time, row in zip(times, tableau.rows, strict=True):
            stage = _advance(x, scale, variable.place(schedule, time)[1], end - start, row, slopes)
            ends = denoise(stage, time)
            slopes.append(variable.slope(schedule, time, ends))
        if s == 0 and len(slopes) == 1:
            return ends.x0, None
        return _advance(x, scale, variable.place(schedule, s)[1], end - start, tableau.weights, slopes), None

    def _fitting(self, schedule: NoiseSchedule, variable: _Variable, t: Tensor, s: Tensor, start: Tensor,
                 end: Tensor) -> tuple[Tableau, list[Tensor]]:
        ends = {0.0: t, 1.0: s}
        for tableau in self.tableaux:
            times = [ends[node] if node in ends else variable.time(schedule, start + node * (end - start))
                     for node in tableau.nodes]
            if min(time.item() for time in times[1:] or [t]) >= schedule.t_min:
                return tableau, times
        return EULER, [t]


def _advance(x: Tensor, scale: Tensor, new_scale: Tensor, width: Tensor, weights: tuple[float, ...],
             slopes: list[Tensor]) -> Tensor:
    """new_scale (x / scale + width sum_i weights_i slopes_i)."""
    if not slopes:
        return x
    x = x * (new_scale / scale)
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = x + slope * (new_scale * width * weight)
    return x


Variable = Literal["flow", "sigma", "t"]


@dataclass(frozen=True, kw_only=True)
class Euler(RungeKutta):
    """Order 1, one call a step. In `flow` and `sigma` it is DDIM at eta 0; on flow matching, Euler on the velocity."""

    kind: Literal["euler"] = "euler"
    variable: Variable = "flow"
    tableaux: ClassVar[tuple[Tableau, ...]] = (EULER,)


@dataclass(frozen=True, kw_only=True)
class Midpoint(RungeKutta):
    """Order 2, two calls a step."""

    order = 2
    calls = 2
    kind: Literal["midpoint"] = "midpoint"
    variable: Variable = "flow"
    tableaux: ClassVar[tuple[Tableau, ...]] = (MIDPOINT, EULER)


@dataclass(frozen=True, kw_only=True)
class Heun(RungeKutta):
    """Order 2, two calls a step, one on the step that lands on t = 0. Karras et al. 2022 (arXiv 2206.00364), alg. 1."""

    order = 2
    calls = 2
    kind: Literal["heun"] = "heun"
    variable: Variable = "flow"
    tableaux: ClassVar[tuple[Tableau, ...]] = (HEUN, EULER)


@dataclass(frozen=True, kw_only=True)
class RK4(RungeKutta):
    """The classic method of order 4, four calls a step; where the last stage may not be called, Heun's third-order
    rule, which has none at the end of the step and so keeps the order."""

    order = 4
    calls = 4
    kind: Literal["rk4"] = "rk4"
    variable: Variable = "flow"
    tableaux: ClassVar[tuple[Tableau, ...]] = (CLASSIC, HEUN3, EULER)


SAMPLERS = (Euler, Midpoint, Heun, RK4)
