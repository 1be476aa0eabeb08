"""Critically damped Langevin diffusion: noise reaches a sample through a velocity beside it, and only that is scored.

Dockhorn et al. 2022 (arXiv 2112.07068). dx = beta v / M dt, dv = -beta (x + Gamma v / M) dt + sqrt(2 Gamma beta) dw
from v ~ N(0, gamma M), with Gamma^2 = 4 M: the least friction without oscillation. It ends in N(0, 1) and N(0, M). Its
level of noise is a 2 x 2 matrix, the same in every element, which no pair (alpha, sigma) of `ldm.schedules` is; so it
stands apart from samplers, predictions and guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.noise import Noise
from ldm.schedules import match


class Phase(NamedTuple):
    """Samples x (B, ...), and of each element its velocity v (B, ...)."""

    x: Tensor
    v: Tensor

    def moved(self, by: Tensor) -> Phase:
        """Each pair (x, v) times a matrix (..., 2, 2), one for all or for each sample."""
        (a, b), (c, d) = ([match(by[..., i, j], self.x) for j in (0, 1)] for i in (0, 1))
        return Phase(a * self.x + b * self.v, c * self.x + d * self.v)

    def plus(self, other: Phase) -> Phase:
        """The sum."""
        return Phase(self.x + other.x, self.v + other.v)


def normal(shape: tuple[int, ...], noise: Noise, dtype: torch.dtype = torch.float32) -> Phase:
    """Noise of both, (B, *shape) each."""
    x, v = (noise.normal(shape, key, dtype=dtype) for key in ("position", "velocity"))
    return Phase(x, v)


Score = Callable[[Phase, Tensor], Tensor]
"""The gradient of log p_t(x, v) in v, (B, ...), of both at a time () or (B,) float64."""


@dataclass(frozen=True, kw_only=True)
class CriticallyDamped(Checked):
    """The process for t from 0, data, to 1. `mass` M; `start` gamma, v's variance over M there; `beta` is constant."""

    kind: Literal["critically-damped"] = "critically-damped"
    mass: float = 0.25
    start: float = 0.04
    beta: float = 4.0
    limits: ClassVar = {"mass": "(0, inf)", "start": "[0, inf)", "beta": "(0, inf)"}

    def transition(self, t: Tensor) -> Tensor:
        """Phi (..., 2, 2) of times (...): what becomes of (x, v) in the mean. With k = M^(-1/2) and b = beta t it is
        e^(-k b) (I + b N), where N = ((k, k^2), (-1, -k)) and N^2 = 0, for both eigenvalues are -k beta."""
        k, b = self.mass**-0.5, self.beta * t[..., None, None]
        phi: Tensor = (-k * b).exp() * (torch.eye(2).to(b) + b * b.new_tensor([[k, k * k], [-1, -k]]))
        return phi

    def covariance(self, t: Tensor, of_x: float = 0.0) -> Tensor:
        """(..., 2, 2) of (x, v) at times (...), of data of variance `of_x`: 0 for one sample, its velocity unknown. It
        is S + Phi (S_0 - S) Phi^T, S = diag(1, M)."""
        end, begun = t.new_tensor([1, self.mass]), t.new_tensor([of_x, self.start * self.mass])
        phi = self.transition(t)
        return end.diag() + phi @ (begun - end).diag() @ phi.mT

    def perturb(self, x0: Tensor, eps: Phase, t: Tensor) -> Phase:
        """(x, v) at t in (0, 1] of samples x0 (B, ...), by noise of both: Phi (x0, 0) + L eps, L the covariance's lower
        root."""
        mean = Phase(x0, torch.zeros_like(x0)).moved(self.transition(t))
        return mean.plus(eps.moved(torch.linalg.cholesky(self.covariance(t))))

    def score(self, eps_v: Tensor, t: Tensor) -> Tensor:
        """The gradient in v that noise eps_v (B, ...) stands for: -eps_v / L_vv, for v comes last in the root."""
        return -eps_v / match(torch.linalg.cholesky(self.covariance(t))[..., 1, 1], eps_v)

    def loss(self, predicted: Tensor, eps: Phase) -> Tensor:
        """Hybrid score matching (B,): the square error of v's noise, a mean over each sample. Least where `score` of
        the prediction is that of the data's own p_t, whatever v was at the start."""
        return (predicted - eps.v).square().flatten(1).mean(1)

    def prior(self, shape: tuple[int, ...], noise: Noise, dtype: torch.dtype = torch.float32) -> Phase:
        """(x, v) at t = 1, (B, *shape) each, of the process's own end."""
        drawn = normal(shape, noise, dtype)
        return drawn._replace(v=self.mass**0.5 * drawn.v)

    def velocity(self, at: Phase, score_v: Tensor) -> Phase:
        """d(x, v) / dt of the ODE with the same marginals."""
        friction = 2 * self.mass**0.5
        return Phase(self.beta / self.mass * at.v,
                     -self.beta * (at.x + friction * (at.v / self.mass + score_v)))

    def sample(self, score: Score, start: Phase, grid: Tensor, noise: Noise) -> Phase:
        """(x, v) at the end of a falling grid of times, by symmetric splitting (the paper's SSCS): one call a step.

        Half a step of the process as it would run back from its end, whose transition is exact; a whole one of what
        the score says beyond that end's own, -v / M; and again half. Data that are N(0, 1), of v ~ N(0, M), are
        therefore drawn exactly in one step. Weak order 1: what the score says is a step of Euler. Steps should shorten
        towards the data, as those of the squares of equal times do. Raises ValueError for a grid that does not fall.
        """
        if len(grid) < 2 or not bool((grid.diff() < 0).all()):
            raise ValueError("grid times must be strictly decreasing, and two at least")
        here, push = start, 4 * self.mass**0.5 * self.beta  # 2 Gamma beta
        for i in range(len(grid) - 1):
            h, own = grid[i] - grid[i + 1], noise.fold("step", i)
            here = self._back(here, h / 2, own.fold("before"))
            v = here.v + push * h * (score(here, (grid[i] + grid[i + 1]) / 2) + here.v / self.mass)
            here = self._back(here._replace(v=v), h / 2, own.fold("after"))
        return here

    def _back(self, at: Phase, h: Tensor, noise: Noise) -> Phase:
        """The process at its end, run back by h: run on with v turned round, and that turned round again."""
        phi, end = self.transition(h), h.new_tensor([1, self.mass]).diag()
        spread = torch.linalg.cholesky(end - phi @ end @ phi.mT)
        z = normal(tuple(at.x.shape[1:]), noise, at.x.dtype)
        ahead = at._replace(v=-at.v).moved(phi).plus(z.moved(spread))
        return ahead._replace(v=-ahead.v)
