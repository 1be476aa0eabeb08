"""SDE-DPM-Solver++(2S) against the formulas of k-diffusion's `sample_dpmpp_sde`, written as they are released."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.exact import F64, final_variance, marginal, scalar, two_modes
from ldm.noise import Noise
from ldm.samplers import DDPM, DPMppSDE2S
from ldm.schedules import EDM, GVP, VP, NoiseSchedule


class Drawn(Noise):
    """Hands out two given draws by their key."""

    def __init__(self, draws: list[Tensor]) -> None:
        super().__init__(torch.zeros(len(draws[0]), dtype=torch.int64))
        object.__setattr__(self, "draws", draws)

    def normal(self, shape: torch.Size, *key: int | str, dtype: torch.dtype = F64) -> Tensor:  # type: ignore[override]
        draws: list[Tensor] = self.draws  # type: ignore[attr-defined]
        return draws[int(key[0]) if key else 0]


def released(x: Tensor, sigma: float, sigma_next: float, to_middle: Tensor, to_end: Tensor) -> Tensor:
    """One step at eta 1 and r 1/2 on sigmas, with the two unit draws that it asks its noise sampler for."""

    def model(x: Tensor, sigma: float) -> Tensor:
        return two_modes(EDM())(x, scalar(sigma / 80)).x0

    def ancestral(start: float, end: float) -> tuple[float, float]:
        up = (end**2 * (start**2 - end**2) / start**2) ** 0.5
        return (end**2 - up**2) ** 0.5, up

    t, t_next = -math.log(sigma), -math.log(sigma_next)
    s = t + (t_next - t) / 2
    denoised = model(x, sigma)
    down, up = ancestral(sigma, math.exp(-s))
    x_2 = (down / sigma) * x - math.expm1(t + math.log(down)) * denoised + to_middle * up
    denoised_2 = model(x_2, math.exp(-s))
    down, up = ancestral(sigma, sigma_next)
    return (down / sigma) * x - math.expm1(t + math.log(down)) * denoised_2 + to_end * up


@pytest.mark.parametrize(("sigma", "sigma_next"), [(9.0, 4.0), (0.8, 0.3), (0.02, 0.004)])
def test_a_step_is_k_diffusions_with_the_noise_of_one_path(sigma: float, sigma_next: float) -> None:
    x, z_1, z_2 = (torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 2))
    x, ratio = sigma * x, sigma_next / sigma
    # Of the noise that the middle has, what is left at the end; its variance, and that of the rest, are e^-h and 1.
    whole = (ratio**0.5 * z_1 + z_2) / (1 + ratio) ** 0.5
    t, s = scalar(sigma / 80), scalar(sigma_next / 80)
    got, _ = DPMppSDE2S().step(two_modes(EDM()), x, t, s, None, Drawn([z_1, z_2]))
    torch.testing.assert_close(got, released(x, sigma, sigma_next, z_1, whole), rtol=1e-9, atol=1e-9)


def test_halves_of_a_step_leave_the_noise_of_the_whole() -> None:
    """Where x0 is known, two steps of `ddpm` with both draws end where one step of this with the same draws does."""
    schedule, x0 = VP(), torch.full((3, 2), 0.4, dtype=F64)

    def known(x: Tensor, t: Tensor) -> object:
        alpha, sigma = schedule(t)
        return two_modes(schedule)(x, t)._replace(x0=x0, eps=(x - alpha * x0) / sigma)

    known.schedule = schedule  # type: ignore[attr-defined]
    t, s = scalar(0.7), scalar(0.4)
    middle = schedule.time((schedule.logsnr(t) + schedule.logsnr(s)) / 2)
    x, z_1, z_2 = (torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4, 5))
    halfway, _ = DDPM().step(known, x, t, middle, None, Drawn([z_1]))  # type: ignore[arg-type]
    there, _ = DDPM().step(known, halfway, middle, s, None, Drawn([z_2]))  # type: ignore[arg-type]
    at_once, _ = DPMppSDE2S().step(known, x, t, s, None, Drawn([z_1, z_2]))  # type: ignore[arg-type]
    torch.testing.assert_close(at_once, there, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", [GVP(), VP(), EDM()], ids=repr)
def test_its_moments_are_nearer_than_those_of_ddpm_for_the_same_calls(schedule: NoiseSchedule) -> None:
    """32 calls from log-SNR -4.6 to 4.6 on N(0, 1/4)."""

    def error(sampler: DDPM | DPMppSDE2S, steps: int) -> float:
        grid = schedule.time(torch.linspace(-4.6, 4.6, steps + 1, dtype=F64))
        variance = final_variance(sampler, schedule, grid, 0.5, marginal(schedule, grid[0], 0.5) ** 0.5)
        return abs(variance - marginal(schedule, grid[-1], 0.5))

    assert error(DPMppSDE2S(), 16) < 0.5 * error(DDPM(), 32)
