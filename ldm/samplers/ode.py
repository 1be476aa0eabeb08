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

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.diffusion import Denoised
from ldm.noise import Noise
from ldm.samplers.base import Memory, Sampler, Step, mix
from ldm.schedules import Level, NoiseSchedule


class Place(NamedTuple):
    """A time, the variable there, and c."""

    t: Tensor
    w: Tensor
    scale: Tensor


class _Variable(NamedTuple):
    """A row of the table above: (w, c) at t, where the level is; the t at which the variable is w; and dz/dw from both
    ends at t."""

    place: Callable[[Tensor, Level], tuple[Tensor, Tensor]]
    time: Callable[[NoiseSchedule, Tensor], Tensor]
    slope: Callable[[NoiseSchedule, Tensor, Denoised], Tensor]

    def at(self, schedule: NoiseSchedule, t: Tensor) -> Place:
        return Place(t, *self.place(t, schedule(t)))

    def between(self, schedule: NoiseSchedule, a: Place, b: Place, node: float) -> Place:
        """The place at a share of the way from a, node 0, to b, node 1."""
        if node in (0, 1):
            return b if node else a
        w = a.w + node * (b.w - a.w)
        return self.at(schedule, self.time(schedule, w))._replace(w=w)


VARIABLES = {
    "flow": _Variable(lambda t, level: (level.sigma / (level.alpha + level.sigma), level.alpha + level.sigma),
                      lambda schedule, w: schedule.time(2 * ((1 - w).log() - w.log())),
                      lambda schedule, t, ends: ends.eps - ends.x0),
    "sigma": _Variable(lambda t, level: (level.sigma / level.alpha, level.alpha),
                       lambda schedule, w: schedule.time(-2 * w.log()),
                       lambda schedule, t, ends: ends.eps),
    "t": _Variable(lambda t, level: (t, torch.ones_like(t)),
                   lambda schedule, w: w,
                   lambda schedule, t, ends: mix(schedule.rates(t), ends)),
}


Variable = Literal["flow", "sigma", "t"]


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


@dataclass(frozen=True, kw_only=True)
class RungeKutta(Sampler):
    """x_s = c_s (x / c_t + (w_s - w_t) sum_i b_i dz/dw_i), by the first tableau whose stages the network may be called
    at, and at last by Euler's."""

    rises = True
    tableaux: ClassVar[tuple[Tableau, ...]]
    kind: str
    variable: Variable = "flow"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        variable, schedule = VARIABLES[self.variable], denoise.schedule
        start, end = variable.at(schedule, t), variable.at(schedule, s)
        if not bool(start.w.isfinite() & end.w.isfinite()):
            return mix(schedule(s), denoise(x, t)), None
        for tableau in (*self.tableaux, EULER):
            places = [variable.between(schedule, start, end, node) for node in tableau.nodes]
            if all(place.t >= schedule.t_min for place in places[1:]):
                break
        slopes: list[Tensor] = []
        for place, row in zip(places, tableau.rows, strict=True):
            ends = denoise(advance(x, start.scale, place.scale, end.w - start.w, row, slopes), place.t)
            slopes.append(variable.slope(schedule, place.t, ends))
        if s == 0 and len(slopes) == 1:
            return ends.x0, None
        return advance(x, start.scale, end.scale, end.w - start.w, tableau.weights, slopes), None


def advance(x: Tensor, scale: Tensor, new_scale: Tensor, width: Tensor, weights: tuple[float, ...],
            slopes: list[Tensor]) -> Tensor:
    """new_scale (x / scale + width sum_i weights_i slopes_i)."""
    x = x * (new_scale / scale)
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = x + slope * (new_scale * width * weight)
    return x


@dataclass(frozen=True, kw_only=True)
class Euler(RungeKutta):
    """Order 1, one call a step. In `flow` and `sigma` it is DDIM at eta 0; on flow matching, Euler on the velocity."""

    kind: Literal["euler"] = "euler"
    tableaux = (EULER,)


@dataclass(frozen=True, kw_only=True)
class Midpoint(RungeKutta):
    """Order 2, two calls a step."""

    order = calls = 2
    kind: Literal["midpoint"] = "midpoint"
    tableaux = (MIDPOINT,)


@dataclass(frozen=True, kw_only=True)
class Heun(RungeKutta):
    """Order 2, two calls a step, one on the step that lands on t = 0. Karras et al. 2022 (arXiv 2206.00364), alg. 1."""

    order = calls = 2
    kind: Literal["heun"] = "heun"
    tableaux = (HEUN,)


@dataclass(frozen=True, kw_only=True)
class RK4(RungeKutta):
    """The classic method of order 4, four calls a step; where the last stage may not be called, Heun's third-order
    rule, which has none at the end of the step and so keeps the order."""

    order = calls = 4
    kind: Literal["rk4"] = "rk4"
    tableaux = (CLASSIC, HEUN3)


SAMPLERS = (Euler, Midpoint, Heun, RK4)
