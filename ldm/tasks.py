"""What a drawing begins from, is held to and ends with, beside its caption: what a pipeline asks of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.coupling import Coupling
from ldm.denoiser import Denoise
from ldm.diffusion import Denoised
from ldm.noise import Noise
from ldm.samplers import Snapshot, mix, prior
from ldm.schedules import NoiseSchedule

Watch = Callable[[Snapshot], None]


def unheld(denoise: Denoise) -> Denoise:
    """The denoiser as it is."""
    return denoise


def unfinished(pixels: Tensor) -> Tensor:
    """The pictures as they are decoded."""
    return pixels


@dataclass(frozen=True)
class Reference:
    """Pictures drawn beside those asked for, whose attention these share: `captions` of them, one or one each."""

    coupling: Coupling
    captions: Sequence[str]


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """What the pictures of one batch begin from, are held to and end with: `ldm.image_tasks` makes them.

    `shape`: (C, h, w) of the latents where it is not that of the size asked for. `source`: clean latents (1 or B,
    *shape) that are noised to where the walk begins; `strength`: the share of the grid's steps that is walked, or
    `start_time`: the time t it begins at. A whole walk begins from the noise of t = 1, without the source; of no step
    the source itself is left. `start`: x (1 or B, *shape) to begin from instead, or how it comes of the seeds' own
    noise. `extras`: what a backbone is shown besides the captions, by name and (1 or B, ...), of the seeds' noise.
    `reference`: a picture beside each, from the same noise where `start` does not change every second x.
    `hold`: a wrapper of the guided denoiser; `draw`: what finds latents instead of the sampler; `finish`: of the
    decoded pictures, uint8 (B, C, H, W). Raises ValueError for a strength or a time outside [0, 1].
    """

    shape: tuple[int, int, int] | None = None
    source: Tensor | None = None
    strength: float = 1.0
    start_time: float | None = None
    start: Tensor | Callable[[Tensor], Tensor] | None = None
    extras: Callable[[Noise], Mapping[str, Tensor]] | None = None
    reference: Reference | None = None
    hold: Callable[[Denoise], Denoise] = unheld
    draw: Callable[[Denoise, Tensor, Noise, Watch | None], Tensor] | None = None
    finish: Callable[[Tensor], Tensor] = unfinished

    def __post_init__(self) -> None:
        for name, value in (("strength", self.strength), ("start time", self.start_time)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"the {name} must lie in [0, 1], got {value}")

    @property
    def parted(self) -> bool:
        """Whether a part of the walk is asked for, neither all of it nor none."""
        return 0 < self.strength < 1 if self.start_time is None else 0 < self.start_time < 1

    def visits(self, grid: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The times of the grid that are walked: its last ones. Raises ValueError for a start time where the network
        may not be called."""
        if self.start_time is None:
            return grid[len(grid) - 1 - walked(self.strength, len(grid) - 1) :]
        if 0 < self.start_time < schedule.t_min:
            raise ValueError(f"the network is called from t_min = {schedule.t_min:g} on: give a start time of at least "
                             f"that, or 0 for the source itself, got {self.start_time}")
        if self.start_time >= grid[0]:
            return grid
        return torch.cat([grid.new_tensor([self.start_time]), grid[grid < self.start_time]])

    def begin(self, schedule: NoiseSchedule, grid: Tensor, times: Tensor, shape: tuple[int, ...],
              noise: Noise) -> Tensor:
        """x at the first of the `times` that are walked of `grid`, (B, *shape)."""
        if isinstance(self.start, Tensor):
            return _each(self.start, len(noise), shape)
        # A start time within the first step leaves as many times as the whole grid has.
        if self.start or self.source is None or times[0] == grid[0]:
            x = prior(schedule, shape, noise)
            return self.start(x) if self.start else x
        source = _each(self.source, len(noise), shape)
        return source if len(times) < 2 else mix(schedule(times[0]), Denoised(source, noise.normal(shape, "prior")))


def _each(given: Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
    """One for all of the samples, one each, or one for each pair of a picture and its reference."""
    return given.repeat_interleave(2, dim=0) if 2 * len(given) == count > 2 else given.expand(count, *shape)


NO_TASK = Task()
Tasks = Callable[[slice], Task]  # of the pictures at a slice of those asked for


def walked(strength: float, steps: int) -> int:
    """How many of a grid's steps a strength walks: the nearest number, halves up."""
    return int(strength * steps + 0.5)
