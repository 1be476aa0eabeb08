"""Adjoint matching: a denoiser learns to draw p(x0) exp(r(x0)), for p of the one that it began as and a reward r.

Domingo-Enrich et al. 2024 (arXiv 2409.08861). Beside it, as what it is compared with, the reward's own gradient:
Clark et al. 2023 (arXiv 2309.17400, DRaFT).

A step of `DDPM` from t to s draws x_s from N(m(x_t), b^2). Whatever noise the samples begin with is forgotten on the
way ("memoryless"): only then is the optimum of reward minus KL divergence p exp(r), and not that of another noise. The
loss is of such steps, so that nothing is infinite at either end; with g^2 ds for b^2 it becomes the paper's
|| 2 / g (v_base - v) + g a ||^2 where steps are short, in this project's direction of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.noise import Noise
from ldm.samplers import DDPM, sample
from ldm.samplers.ancestral import decay, posterior_mean, posterior_std

Reward = Callable[[Tensor], Tensor]
"""What samples (B, ...) are worth, (B,), by something that can be differentiated."""


def walked(denoise: Denoise, x: Tensor, grid: Tensor, noise: Noise) -> list[Tensor]:
    """x (B, ...) at each time of a grid from 1 to 0, by `DDPM`, without gradient. Raises ValueError as `sample` does,
    and for a grid that ends before the data."""
    if grid[-1] != 0:
        raise ValueError(f"a reward is of clean samples: the grid must end at 0, this one does at {grid[-1].item():g}")
    path = [x]
    sample(DDPM(), denoise, x, grid, noise, lambda shot: path.append(shot.x))
    return path


def mean(denoise: Denoise, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """m(x): the mean of x at s, of x (B, ...) at t. Times are () float64."""
    ends, schedule = denoise(x, t), denoise.schedule
    return ends.x0 if s == 0 else posterior_mean(schedule(s), ends, decay(schedule, t, s))


def spread(denoise: Denoise, t: Tensor, s: Tensor) -> Tensor:
    """b, () float64: the standard deviation of x at s about that mean, 0 on the step that lands on the data."""
    return torch.zeros_like(s) if s == 0 else posterior_std(denoise.schedule(s), decay(denoise.schedule, t, s))


def lean_adjoint(base: Denoise, path: Sequence[Tensor], grid: Tensor, reward: Reward) -> list[Tensor]:
    """a at each point of a path: minus the gradient of the reward at its end, and before that m'(x)^T a of the step.

    Of `base`, the denoiser as it was, whatever drew the path; "lean" since what the learner adds is not in it. A step
    costs a call and its vector-Jacobian product.
    """
    found = [_gradient(lambda x: -reward(x).sum(), path[-1])]
    for i in range(len(grid) - 2, -1, -1):
        found.insert(0, _gradient(partial(_along, base, grid[i], grid[i + 1], found[0]), path[i]))
    return found


def _along(base: Denoise, t: Tensor, s: Tensor, a: Tensor, x: Tensor) -> Tensor:
    """m(x) . a, whose gradient in x is m'(x)^T a."""
    return (mean(base, x, t, s) * a).sum()


def _gradient(of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.enable_grad():
        free = x.detach().requires_grad_()
        return torch.autograd.grad(of(free), free)[0]


def adjoint_matching(denoise: Denoise, base: Denoise, path: Sequence[Tensor], adjoint: Sequence[Tensor], grid: Tensor,
                     step: int) -> Tensor:
    """|| (m(x) - m_base(x)) / b + b a(s) ||^2 (B,) float32, of one step of a path: number `step`, from grid[step].

    Where it is least over all paths of the learner itself, the learner draws p exp(r). Raises ValueError for the step
    onto the data, which adds no noise: nothing is learned there.
    """
    t, s = grid[step], grid[step + 1]
    if (b := spread(base, t, s)) == 0:
        raise ValueError(f"step {step} lands on the data and adds no noise: choose one before it")
    with torch.no_grad():
        goal = mean(base, path[step], t, s) - b**2 * adjoint[step + 1]
    return ((mean(denoise, path[step], t, s) - goal) / b).float().square().flatten(1).sum(1)


def matched(denoise: Denoise, base: Denoise, x: Tensor, grid: Tensor, noise: Noise, reward: Reward,
            steps: Iterable[int]) -> Iterator[Tensor]:
    """Of a new path of the learner's, from x at t = 1, the loss (B,) of each of some steps: one after the other, so
    that the memory of differentiating is that of one."""
    path = walked(denoise, x, grid, noise)
    adjoint = lean_adjoint(base, path, grid, reward)
    for step in steps:
        yield adjoint_matching(denoise, base, path, adjoint, grid, step)


def direct(denoise: Denoise, x: Tensor, grid: Tensor, noise: Noise, reward: Reward, last: int = 1) -> Tensor:
    """Minus the reward (B,) of what is drawn, differentiated through the `last` steps of the way alone.

    Nothing holds the learner to what it was: with time it draws the few things of the highest reward, or what only the
    reward takes for good. Raises ValueError unless 1 <= last <= steps.
    """
    if not 1 <= last <= len(grid) - 1:
        raise ValueError(f"last must be one of the {len(grid) - 1} steps, 1 or more, got {last}")
    early = len(grid) - 1 - last
    there = sample(DDPM(), denoise, x, grid[: early + 1], noise) if early else x
    for i in range(early, len(grid) - 1):
        there, _ = DDPM().step(denoise, there, grid[i], grid[i + 1], None, noise.fold("step", i))
    return -reward(there)
