"""Solvers of the probability-flow ODE that choose their own steps, for each sample by its own error.

A step of the grid is tried whole by an embedded pair of Runge-Kutta rules; where the two differ by more than the
tolerance it is halved, and each half is tried again. Halving keeps the samples of a batch at the same times, so that a
network (and whatever guides it) is called at one time for all of them, yet which halves a sample takes depends on
nothing but itself. The variable is `flow` of `ldm.samplers.ode`, in which no process has an infinite end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.noise import Noise
from ldm.samplers.base import Sampler, Step
from ldm.samplers.ode import VARIABLES, Place

_FLOW = VARIABLES["flow"]


class Pair(NamedTuple):
    """Two rules on the same stages: nodes and rows as in a `Tableau`, the last row being the finer rule itself, and the
    weights of the difference between the two."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    difference: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Embedded(Sampler):
    """Error control by an embedded pair whose last stage is the first of the next step.

    A trial is accepted where the root mean square of (difference of the rules) / (tolerance (1 + |z|)) over the sample
    is at most 1, or after `halvings` halvings of the grid's step. Asking that costs a synchronisation a trial.
    """

    order = calls = 0
    rises = True
    limits: ClassVar = {"tolerance": "(0, inf]", "halvings": "[0, inf)"}
    pair: ClassVar[Pair]
    kind: str
    tolerance: float
    halvings: int = 10

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Tensor | None, noise: Noise) -> Step:
        schedule = denoise.schedule
        start, end = _FLOW.at(schedule, t), _FLOW.at(schedule, s)
        z, slope = x / start.scale, self._slope(denoise, x, t) if memory is None else memory
        # Below t_min there is nothing to call: the last slope leads there, at s = 0 to the estimate of x0.
        least = torch.full_like(s, schedule.t_min).minimum(t)
        last = end if s >= least else _FLOW.at(schedule, least)
        if last.t != t:
            everyone = torch.ones(len(x), dtype=torch.bool, device=x.device)
            z, slope = self._walk(denoise, z, slope, start, last, everyone, self.halvings)
        return (z + slope * (end.w - last.w)) * end.scale, slope

    def _slope(self, denoise: Denoise, x: Tensor, t: Tensor) -> Tensor:
        return _FLOW.slope(denoise.schedule, t, denoise(x, t))

    def _walk(self, denoise: Denoise, z: Tensor, slope: Tensor, a: Place, b: Place, wanted: Tensor,
              halvings: int) -> tuple[Tensor, Tensor]:
        """z and its slope at b from those at a, within tolerance for the samples that are `wanted` (B,)."""
        width, slopes = b.w - a.w, [slope]
        for node, row in zip(self.pair.nodes[1:], self.pair.rows[1:], strict=True):
            place = _FLOW.between(denoise.schedule, a, b, node)
            moved = z + _combined(slopes, row) * width
            slopes.append(self._slope(denoise, moved * place.scale, place.t))
        # The last stage was taken at the result itself.
        allowed = self.tolerance * (1 + z.abs().maximum(moved.abs()))
        error = (_combined(slopes, self.pair.difference) * width / allowed).square().flatten(1).mean(1)
        fine = error <= 1
        if halvings == 0 or bool((fine | ~wanted).all()):
            return moved, slopes[-1]
        middle, missed = _FLOW.between(denoise.schedule, a, b, 0.5), wanted & ~fine
        half = self._walk(denoise, z, slope, a, middle, missed, halvings - 1)
        whole = self._walk(denoise, *half, middle, b, missed, halvings - 1)
        fine = fine.view(-1, *[1] * (z.ndim - 1))
        return torch.where(fine, moved, whole[0]), torch.where(fine, slopes[-1], whole[1])


def _combined(slopes: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    used = [slope * weight for slope, weight in zip(slopes, weights, strict=True) if weight]
    return torch.stack(used).sum(0)


@dataclass(frozen=True, kw_only=True)
class DormandPrince(Embedded):
    """Dormand-Prince 5(4), six calls a trial: RK45 of other libraries. Dormand & Prince 1980; Song et al. 2021 (arXiv
    2011.13456), appendix D.4, use it at 1e-5. Its order is set by the tolerance, not by the grid."""

    kind: Literal["dopri5"] = "dopri5"
    tolerance: float = 1e-4
    pair = Pair(
        (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
        ((), (1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9),
         (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
         (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
         (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
        (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40))


@dataclass(frozen=True, kw_only=True)
class BogackiShampine(Embedded):
    """Bogacki-Shampine 3(2), three calls a trial: the cheaper pair where a coarse answer will do. Bogacki & Shampine
    1989. Its order is set by the tolerance, not by the grid."""

    kind: Literal["bosh3"] = "bosh3"
    tolerance: float = 1e-3
    pair = Pair((0, 1 / 2, 3 / 4, 1), ((), (1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
                (-5 / 72, 1 / 12, 1 / 9, -1 / 8))


SAMPLERS = (DormandPrince, BogackiShampine)
