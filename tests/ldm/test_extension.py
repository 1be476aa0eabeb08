"""A schedule, a prediction and a sampler from outside the package work with all that is in it, as objects."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from oracles import F64, Isotropic, Through, final_variance, fitted_order, marginal, scalar
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.diffusion import Diffusion
from ldm.grids import GRIDS, Given
from ldm.noise import Noise
from ldm.predictions import PREDICTIONS
from ldm.samplers import SAMPLERS, Memory, Sampler, mix, prior, sample
from ldm.schedules import SCHEDULES, Level, NoiseSchedule
from ldm.schedules.base import Continuous
from ldm.weighting import WEIGHTINGS


@dataclass(frozen=True, kw_only=True)
class Secant(Continuous):
    """alpha = 1 - t^2, sigma = t: neither of constant variance nor straight."""

    kind: str = "secant"
    t_min: float = 1e-4

    @property
    def pure_noise(self) -> bool:
        return True

    def __call__(self, t: Tensor) -> Level:
        return Level((1 - t) * (1 + t), t)

    def rates(self, t: Tensor) -> Level:
        return Level(-2 * t, torch.ones_like(t))

    def logsnr(self, t: Tensor) -> Tensor:
        alpha, sigma = self(t)
        return 2 * (alpha.log() - sigma.log())

    def time(self, logsnr: Tensor) -> Tensor:
        # r = (1 - t^2) / t, so t = 2 / (r + sqrt(r^2 + 4)).
        ratio = (logsnr / 2).exp()
        return 2 / (ratio + (ratio**2 + 4).sqrt())


@dataclass(frozen=True, kw_only=True)
class Twice(Sampler):
    """Two DDIM steps for one, meeting at the middle of log-SNR where there is one."""

    order = 1
    calls = 2
    kind: str = "twice"

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise
    ) -> tuple[Tensor, Memory]:
        schedule = denoise.schedule
        middle = schedule.time((schedule.logsnr(t) + schedule.logsnr(s)) / 2)
        if not math.isfinite(middle.item()) or not s < middle < t:
            return mix(schedule(s), denoise(x, t)), None
        return mix(schedule(s), denoise(mix(schedule(middle), denoise(x, t)), middle)), None


@pytest.mark.parametrize("sampler", [*(cls() for cls in SAMPLERS), Twice()], ids=repr)
def test_a_new_schedule_is_sampled_by_every_sampler(sampler: Sampler) -> None:
    schedule, counts, errors = Secant(), [32, 64, 128], []
    for steps in counts if sampler.order else []:
        grid = schedule.time(torch.linspace(-4.6, 4.6, steps + 1, dtype=F64))
        variance = final_variance(sampler, schedule, grid, 0.5, marginal(schedule, grid[0], 0.5) ** 0.5)
        errors.append(abs(variance - marginal(schedule, grid[-1], 0.5)))
    assert not errors or fitted_order(counts, errors) > sampler.order - 0.25


@pytest.mark.parametrize("schedule", [*(cls() for cls in SCHEDULES), Secant()], ids=repr)
def test_a_new_sampler_samples_every_schedule_prediction_and_grid(schedule: NoiseSchedule) -> None:
    noise = Noise.from_seeds([0, 1])
    for prediction in (cls() for cls in PREDICTIONS):
        if prediction.refusal(schedule) is not None:
            continue
        diffusion = Diffusion(schedule=schedule, prediction=prediction)
        for grid in (cls() for cls in GRIDS if cls is not Given):
            x = prior(schedule, (2,), noise, dtype=F64)
            drawn = sample(Twice(), Through(Isotropic(schedule), diffusion), x, grid(5, schedule), noise)
            assert bool(drawn.isfinite().all())
        for weighting in (cls() for cls in WEIGHTINGS):
            assert weighting(diffusion, scalar(0.5)[None]).isfinite()
