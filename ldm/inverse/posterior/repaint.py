"""RePaint: a hole is filled while the rest is replaced at every step, and the walk goes back up again and again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.inverse.operators import Operator
from ldm.inverse.operators.masks import Masking
from ldm.inverse.posterior.base import Posterior, Problem
from ldm.noise import Noise
from ldm.samplers import DDPM, prior
from ldm.samplers.renoise import renoised


@dataclass(frozen=True, kw_only=True)
class RePaint(Posterior):
    """A `ddpm` step, then x_s = alpha_s y + sigma_s z where y is seen; at every `jump`th level the walk goes `jump`
    steps up by the forward process and comes down again, `resamples` times in all.

    The seen part of x0 is y exactly. `resamples` 1 is plain replacement, whose hole ignores what is around it; more
    bring the mean to the posterior's, and with jump 1 the variance below it. On 250 steps with both at 10 it makes 2410
    network calls. Lugmayr et al. 2022 (arXiv 2201.09865), algorithm 1 and appendix B. Raises ValueError for another
    operator than a mask, and for a y with noise.
    """

    limits: ClassVar = {"jump": "[1, inf)", "resamples": "[1, inf)"}
    kind: Literal["repaint"] = "repaint"
    jump: int = 10
    resamples: int = 10
    variance: Literal["small", "large", "learned"] = "small"

    def refusal(self, operator: Operator, sigma_y: float) -> str | None:
        if not isinstance(operator, Masking):
            return "fills what a mask hides; for another operator take split-gibbs, ddrm, resample or dps"
        if sigma_y:
            return f"keeps y as it is, so that sigma_y is 0, got {sigma_y:g}; else take split-gibbs or ddrm"
        return None

    def calls(self, grid: Tensor) -> int:
        return sum(after > before for before, after in pairwise(self.visits(len(grid) - 1)))

    def visits(self, steps: int) -> list[int]:
        """The places on a grid of `steps` in the order of visits, from 0, the noise, to `steps`, the data."""
        left = {steps - 1 - level: self.resamples - 1 for level in range(0, steps - self.jump, self.jump)}
        visits = [0]
        while visits[-1] < steps:
            place = visits[-1] + 1
            visits.append(place)
            if left.get(place, 0):
                left[place] -= 1
                visits += range(place - 1, place - self.jump - 1, -1)
        return visits

    def walk(self, denoise: Denoise, problem: Problem, times: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        assert isinstance(problem.operator, Masking)
        seen = problem.operator.seen(*problem.shape[1:]).to(problem.y.device, torch.bool)
        x = prior(denoise.schedule, problem.shape, noise, problem.y.dtype)
        for index, (before, after) in enumerate(pairwise(self.visits(len(times) - 1))):
            x = self.move(denoise, seen, problem.y, x, times[before], times[after], noise.fold("step", index))
            yield x, times[after]

    def move(self, denoise: Denoise, seen: Tensor, y: Tensor, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        """x at s from x at t: down with what is seen (H, W) replaced, or up."""
        if s > t:
            return renoised(denoise.schedule, x, t, s, noise.normal(x.shape[1:], "up", dtype=x.dtype))
        x, _ = DDPM(variance=self.variance).step(denoise, x, t, s, None, noise)
        alpha, sigma = denoise.schedule(s)
        return (alpha * y + sigma * noise.normal(x.shape[1:], "seen", dtype=x.dtype)).where(seen, x)


POSTERIORS = (RePaint,)
