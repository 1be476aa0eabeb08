"""Samplers that step through the Gaussian posterior q(x_s | x_t, x0): DDPM and DDIM.

With e = alpha_t sigma_s / (alpha_s sigma_t), the square root of the ratio of SNRs, that posterior is
x_s = alpha_s x0 + sigma_s e eps + sigma_s sqrt(1 - e^2) z: no division by alpha or sigma is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ldm.denoiser import Denoise
from ldm.diffusion import Denoised
from ldm.noise import Noise
from ldm.samplers.base import Memory, Sampler, Step, mix
from ldm.schedules import Level, NoiseSchedule


def decay(schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Tensor:
    """ln e^2 = logsnr(t) - logsnr(s), minus infinity from pure noise or onto a clean sample."""
    return schedule.logsnr(t) - schedule.logsnr(s)


def posterior_mean(level: Level, ends: Denoised, log_e2: Tensor) -> Tensor:
    """Of x_s at a level, by `decay`."""
    return level.alpha * ends.x0 + level.sigma * (log_e2 / 2).exp() * ends.eps


def posterior_std(level: Level, log_e2: Tensor) -> Tensor:
    """Of x_s at its level; with the level of x_t, the standard deviation of the forward step."""
    return level.sigma * (-log_e2.expm1()).sqrt()


def posterior(level: Level, ends: Denoised, h: Tensor, z: Tensor) -> Tensor:
    """x_s at a level, half log-SNR having grown by h, so that e = exp(-h), by the draw z."""
    return posterior_mean(level, ends, -2 * h) + posterior_std(level, -2 * h) * z


@dataclass(frozen=True, kw_only=True)
class DDPM(Sampler):
    """Ancestral sampling with the posterior's mean and one of three variances. Order 1, one call a step.

    `small` is the posterior's own, beta~; `large` is beta, the forward step's; `learned` lies between them in
    logarithm, where the network says. No noise is added on the step that lands on t = 0. Ho et al. 2020 (arXiv
    2006.11239), algorithm 2; Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 15. Raises ValueError for `learned`
    without such a network.
    """

    kind: Literal["ddpm"] = "ddpm"
    variance: Literal["small", "large", "learned"] = "small"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        ends, level = denoise(x, t), denoise.schedule(s)
        if s == 0:
            return ends.x0, None
        log_e2 = decay(denoise.schedule, t, s)
        small, large = posterior_std(level, log_e2), posterior_std(denoise.schedule(t), log_e2)
        spread: Tensor = large if self.variance == "large" else small
        if self.variance == "learned":
            if ends.log_var_frac is None:
                raise ValueError("ddpm variance 'learned' needs a network that learned it; use small or large")
            spread = small * ((large / small).log() * ends.log_var_frac).exp()
        return posterior_mean(level, ends, log_e2) + spread * noise.normal(x.shape[1:], dtype=x.dtype), None


@dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - c^2) eps + c z, c = eta sqrt(beta~). Order 1, one call a step.

    eta 0 is deterministic, eta 1 is `ddpm`. At eta 0 it also steps away from the data (s > t), with eps taken at t.
    Song et al. 2021 (arXiv 2010.02502), eq. 12.
    """

    rises = True
    limits: ClassVar = {"eta": "[0, 1]"}
    kind: Literal["ddim"] = "ddim"
    eta: float = 0.0

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        ends, level = denoise(x, t), denoise.schedule(s)
        if self.eta == 0 or s == 0:
            return mix(level, ends), None
        if s > t:
            raise ValueError("ddim steps away from the data only at eta 0")
        fresh = -self.eta**2 * decay(denoise.schedule, t, s).expm1()
        mean = level.alpha * ends.x0 + level.sigma * (1 - fresh).sqrt() * ends.eps
        return mean + level.sigma * fresh.sqrt() * noise.normal(x.shape[1:], dtype=x.dtype), None


@dataclass(frozen=True, kw_only=True)
class DDIMInversion(Sampler):
    """From a sample back to its noise, on a rising grid: x_s = (alpha_s / alpha_t) x + (sigma_s - alpha_s sigma_t /
    alpha_t) eps.

    eps is the network's at the target time s, where it may be called although t = 0 is where the walk starts: of x, and
    with more than one of `iterations` of x_s as last found, a fixed point that `ddim` takes exactly back. Order 1, one
    call an iteration. A walk back under guidance is another ODE and ends elsewhere; `ldm.inversion` serves any.
    Mokady et al. 2023 (arXiv 2211.09794), eq. 3; Pan et al. 2023 (arXiv 2309.04907). Raises ValueError on a
    falling grid.
    """

    rises = True
    limits: ClassVar = {"iterations": "[1, inf)"}
    kind: Literal["ddim-inversion"] = "ddim-inversion"
    iterations: int = 1

    @property
    def calls(self) -> int:
        return self.iterations

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        if s < t:
            raise ValueError("ddim-inversion walks away from the data: its grid must rise")
        (alpha, sigma), level = denoise.schedule(t), denoise.schedule(s)
        keep, there = level.alpha / alpha, x
        for _ in range(self.iterations):
            there = keep * x + (level.sigma - keep * sigma) * denoise(there, s).eps
        return there, None


SAMPLERS = (DDPM, DDIM)
