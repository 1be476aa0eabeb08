"""The density that a denoiser gives to data, by the change of variables along its probability-flow ODE.

In w = sigma / (alpha + sigma) and z = x / (alpha + sigma) the ODE is dz/dw = eps - x0, finite at both ends of any
process, and d log p(z) / dw = -div. Song et al. 2021 (arXiv 2011.13456), appendix D.2; Grathwohl et al. 2019 (arXiv
1810.01367).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.noise import Noise
from ldm.samplers.base import check_grid
from ldm.samplers.ode import CLASSIC, VARIABLES, Place, advance


def log_likelihood(denoise: Denoise, x: Tensor, grid: Tensor, probe: Noise | None = None, probes: int = 1) -> Tensor:
    """log p(x) in nats, (B,), of data x (B, ...) noised by t_min, with N(0, prior_std^2) for the density at t = 1.

    Classic Runge-Kutta of y = (z, the change of log p so far) over the grid, which may fall or rise; times below t_min
    stand for t_min. The trace is exact, at
    one backward pass a dimension, or with `probe` (one seed per sample) Hutchinson's estimate: the mean over `probes`
    Rademacher vectors a sample, kept over the whole path. Raises ValueError on a bad grid, a wrong number of seeds, and
    fewer than one vector.
    """
    if probe is not None and (len(probe) != len(x) or probes < 1):
        raise ValueError(f"{len(x)} samples need as many seeds, got {len(probe)}, and at least 1 probe, got {probes}")
    schedule, variable = denoise.schedule, VARIABLES["flow"]
    times = check_grid(grid).sort().values.clamp(min=schedule.t_min)
    times = torch.cat([times[:1], times[1:][times.diff() > 0]])
    vectors, shape, one = _vectors(x, probe, probes), x.shape, torch.ones((), dtype=torch.float64)

    def slope(y: Tensor, place: Place) -> Tensor:
        with torch.enable_grad():
            leaf = y[:, :-1].view(shape).detach().requires_grad_()
            ends = denoise(leaf * place.scale, place.t)
            velocity = ends.eps - ends.x0
            traces = [(torch.autograd.grad(velocity, leaf, vector, retain_graph=True)[0] * vector).flatten(1).sum(1)
                      for vector in vectors]
        trace = torch.stack(traces).sum(0) / (1 if probe is None else probes)
        return torch.cat([velocity.detach().flatten(1), trace[:, None]], 1)

    places = [variable.at(schedule, time) for time in times.unbind()]
    first, last = places[0].scale, places[-1].scale
    y = torch.cat([(x / first).flatten(1), torch.zeros_like(x.flatten(1)[:, :1])], 1)
    for start, end in pairwise(places):
        slopes: list[Tensor] = []
        for node, row in zip(CLASSIC.nodes, CLASSIC.rows, strict=True):
            moved = advance(y, one, one, end.w - start.w, row, slopes)
            slopes.append(slope(moved, variable.between(schedule, start, end, node)))
        y = advance(y, one, one, end.w - start.w, CLASSIC.weights, slopes)
    std, dims = schedule.prior_std, math.prod(shape[1:])
    prior = -0.5 * (y[:, :-1] * last / std).square().sum(1) - dims * math.log(std * math.sqrt(2 * math.pi))
    return prior + y[:, -1] + dims * (last / first).log()


def _vectors(x: Tensor, probe: Noise | None, probes: int) -> list[Tensor]:
    """What the trace is taken along: every unit vector, or some of random signs."""
    if probe is not None:
        signs = torch.where(probe.uniform((probes, *x.shape[1:]), "rademacher") < 0.5, -1.0, 1.0)
        return list(signs.to(x.dtype).to(x.device).unbind(1))
    units = torch.eye(math.prod(x.shape[1:]), dtype=x.dtype, device=x.device)
    return [unit.view(1, *x.shape[1:]).expand_as(x) for unit in units]


def bits_per_dim(nats: Tensor, dims: int, offset: float = 0.0) -> Tensor:
    """-log2 p per dimension; `offset` is 7 for 8-bit images scaled to [-1, 1], whose bins are 2^-7 wide."""
    return -nats / (dims * math.log(2)) + offset
