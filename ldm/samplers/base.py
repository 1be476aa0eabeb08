"""What every sampler is: a rule for x_s from x_t = alpha_t x0 + sigma_t eps and what a network says of x0 and eps; and
the loop that walks x down the times of a grid with one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.denoiser import Bound, Denoise
from ldm.diffusion import Denoised
from ldm.jumps import BoundJump, jumping
from ldm.noise import Noise
from ldm.schedules import Level, NoiseSchedule

Memory = Any
"""What a multistep sampler hands from one step to the next: None before the first step."""
Step = tuple[Tensor, Memory]
"""x at s, and the memory for the step from there."""


class Sampler(Checked, ABC):
    """A way to go from x_t to x_s. Frozen and stateless: whatever a step needs to remember it returns as memory.

    `order` is the power of the step with which its error falls (the variance's, where it adds noise), 0 where that is
    not what sets it; `calls` the number of network calls a step away from the ends, 0 where it depends on grid or data;
    `rises` whether it also walks away from the data, as rules without noise can: s > t; `jumps` whether it asks a
    few-step model where x goes (`ldm.jumps`), and refuses others. Where settings change them they are of the instance.
    """

    rises = False
    jumps = False

    @property
    def order(self) -> int:
        return 1

    @property
    def calls(self) -> int:
        return 1

    @abstractmethod
    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        """x at s from x at t, and the memory for the next step. t and s are float64 () on the CPU; noise is this step's
        own source."""


class Snapshot(NamedTuple):
    """What `watch` is shown after each step: its index, the time reached, x there, the last estimate of x0, and the
    number of network calls so far."""

    step: int
    t: float
    x: Tensor
    x0: Tensor
    calls: int


def check_grid(grid: Tensor) -> Tensor:
    """The grid in float64 on the CPU. Raises ValueError unless it has a step, lies in [0, 1] and is strictly
    monotone."""
    grid = grid.detach().to("cpu", torch.float64)
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"a grid is a list of at least two times, got shape {tuple(grid.shape)}")
    if not bool(((grid >= 0) & (grid <= 1)).all()):
        raise ValueError(f"grid times must lie in [0, 1], got {grid.min().item():g} to {grid.max().item():g}")
    steps = grid.diff()
    if not (bool((steps < 0).all()) or bool((steps > 0).all())):
        raise ValueError("grid times must be strictly decreasing (sampling) or strictly increasing (inversion)")
    return grid


def sample(sampler: Sampler, denoise: Denoise, x: Tensor, grid: Tensor, noise: Noise,
           watch: Callable[[Snapshot], None] | None = None) -> Tensor:
    """Walk x (B, ...) along `grid`, from x at grid[0] to x at grid[-1], calling `watch` after every step.

    `noise` has one seed per sample. Raises ValueError on a bad grid, one that rises where the sampler cannot, or a
    wrong number of seeds.
    """
    if len(noise) != len(x):
        raise ValueError(f"{len(x)} samples need as many seeds, got {len(noise)}")
    times = check_grid(grid).unbind()
    if times[1] > times[0] and not sampler.rises:
        raise ValueError(f"{sampler.kind} walks from noise to data: its grid must fall, and this one rises")
    memory: Memory = None
    calls = 0
    x0 = x

    def watched(x: Tensor, t: Tensor) -> Denoised:
        nonlocal calls, x0
        calls, ends = calls + 1, denoise(x, t)
        x0 = ends.x0
        return ends

    def jumped(x: Tensor, t: Tensor, s: Tensor) -> Denoised:
        nonlocal calls, x0
        calls, ends = calls + 1, jumping(denoise).jump(x, t, s)
        x0 = ends.x0
        return ends

    asked = denoise
    if watch:
        asked = BoundJump(denoise.schedule, jumped) if sampler.jumps else Bound(denoise.schedule, watched)
    with torch.no_grad():
        for index, (t, s) in enumerate(pairwise(times)):
            x, memory = sampler.step(asked, x, t, s, memory, noise.fold("step", index))
            if watch is not None:
                watch(Snapshot(index, s.item(), x, x0, calls))
    return x


def prior(schedule: NoiseSchedule, shape: tuple[int, ...], noise: Noise, dtype: torch.dtype = torch.float32) -> Tensor:
    """x at t = 1, shape (B, *shape): Gaussian noise of the schedule's own scale."""
    return schedule.prior_std * noise.normal(shape, "prior", dtype=dtype)


def half_logsnr(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """lambda = ln(alpha / sigma)."""
    return schedule.logsnr(t) / 2


def noise_ratio(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """sigma / alpha at t, infinite at pure noise."""
    return (-half_logsnr(schedule, t)).exp()


def mix(level: Level, ends: Denoised) -> Tensor:
    """x at a level from both ends: alpha x0 + sigma eps."""
    return level.alpha * ends.x0 + level.sigma * ends.eps
