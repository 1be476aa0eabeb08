"""Edit-friendly inversion: the noise with which an ancestral sampler draws a given picture, under any guidance.

Huberman-Spiegelglas et al. 2023 (arXiv 2304.06140). With the same denoiser the walk is the source; with another caption
it is an edit of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.denoiser import Bound, Denoise
from ldm.diffusion import Denoised
from ldm.noise import Noise
from ldm.samplers import DDIM, DDPM, Sampler, Snapshot, check_grid, mix, sample


@dataclass(frozen=True, eq=False)
class Recorded(Noise):
    """Draws (steps, B, ...) in place of noise: a sampler that draws once a step is given them one after another.

    Raises ValueError for any other draw.
    """

    draws: Tensor

    def __getitem__(self, index: slice | Tensor) -> Recorded:
        return Recorded(self.seeds[index], self.draws[:, index])

    def fold(self, *key: int | str) -> Recorded:
        name, step = key
        if name != "step" or not isinstance(step, int):
            raise ValueError(f"recorded noise has draws of steps alone, not of {key}")
        return Recorded(self.seeds, self.draws[step : step + 1])

    def normal(self, shape: Sequence[int], *key: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
        if key or self.draws.shape != (1, len(self), *shape):
            raise ValueError(f"recorded noise is one draw a step of shape {tuple(self.draws.shape[2:])}, asked for "
                             f"{tuple(shape)}: walk the grid it was found on with the sampler it was found for")
        return self.draws[0].to(dtype)


@dataclass(frozen=True)
class Inverted:
    """A source as a walk: the sampler and its grid, where it starts, the noise of its steps, and what the last step,
    which draws none, leaves of the source."""

    sampler: Sampler
    grid: Tensor
    start: Tensor
    noise: Recorded
    residual: Tensor

    def walk(self, denoise: Denoise, watch: Callable[[Snapshot], None] | None = None) -> Tensor:
        """The source under the denoiser it was inverted with, its edit under another: x at t = 0."""
        return sample(self.sampler, denoise, self.start, self.grid, self.noise, watch) + self.residual


def edit_friendly(sampler: Sampler, denoise: Denoise, source: Tensor, grid: Tensor, noise: Noise) -> Inverted:
    """The walk of an ancestral sampler from x_t at grid[0] that ends at `source` (B, ...), at one call a step.

    Every x_t = alpha x0 + sigma eps has an eps of its own, so that the draws z = (x_s - mean(x_t)) / std have more than
    unit variance and are not independent: section 3.2. A grid from below 1 keeps more of the source: the paper's
    T_skip. A draw is keyed by the steps that are left, so that the same grid from a later time has the same x_t. Raises
    ValueError for a sampler other than `ddpm` and `ddim` with eta > 0, and for a grid that does not end at 0.
    """
    if not isinstance(sampler, DDPM | DDIM) or (isinstance(sampler, DDIM) and sampler.eta == 0):
        raise ValueError(f"edit-friendly inversion needs a sampler of one draw a step, got {sampler}: take ddpm, or "
                         "ddim with eta above 0")
    times, schedule = check_grid(grid).unbind(), denoise.schedule
    if times[-1] != 0:
        raise ValueError(f"edit-friendly inversion needs a grid that falls to 0, got one to {times[-1].item():g}")

    def noised(index: int) -> Tensor:
        eps = noise.normal(source.shape[1:], "edit-friendly", len(times) - index, dtype=source.dtype)
        return mix(schedule(times[index]), Denoised(source, eps))

    def step(ends: Denoised, t: Tensor, s: Tensor, z: Tensor) -> Tensor:
        found = Recorded(noise.seeds, z[None])
        return sampler.step(Bound(schedule, lambda x, t: ends), source, t, s, None, found)[0]

    zero, one = torch.zeros_like(source), torch.ones_like(source)
    draws = source.new_empty(len(times) - 2, *source.shape)
    start = x = noised(0)
    with torch.no_grad():
        for index, (t, s) in enumerate(pairwise(times[:-1])):
            ends = denoise(x, t)
            std = step(ends._replace(x0=zero, eps=zero), t, s, one)
            draws[index] = (noised(index + 1) - step(ends, t, s, zero)) / std
            x = step(ends, t, s, draws[index])  # as it will be walked, so that no rounding is left over
        residual = source - denoise(x, times[-2]).x0
    return Inverted(sampler, grid, start, Recorded(noise.seeds, draws), residual)
