"""Samplers of the reverse SDE and of Langevin dynamics.

With f = alpha' / alpha and g^2 = 2 sigma (sigma' - f sigma), the forward process is dx = f x dt + g dw. None of them
can leave alpha = 0, where f is infinite: from there the first step is the exact posterior's (`ddpm`). Every last step
lands on t = 0 without noise, from x0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ldm.denoiser import Denoise
from ldm.noise import Noise
from ldm.samplers.ancestral import DDPM
from ldm.samplers.base import Memory, Sampler, Step, mix
from ldm.schedules import NoiseSchedule


def _ends(denoise: Denoise, t: Tensor, s: Tensor) -> bool:
    """Whether a step touches an end where log-SNR is infinite."""
    return bool(denoise.schedule.logsnr(t).isinf()) or s.item() == 0


@dataclass(frozen=True, kw_only=True)
class EulerMaruyama(Sampler):
    """x_s = x + (s - t) (velocity + w eps / 2 sigma) + sqrt(w (t - s)) z. Weak order 1, one call a step.

    `diffusion` is w: "sde" for g^2, the process's own, or "sigma" for w = `strength` sigma, which any process allows
    and which is the usual stochastic sampler of flow matching. Song et al. 2021 (arXiv 2011.13456), eq. 6; Ma et al.
    2024 (arXiv 2401.08740), eq. 4 and table 2.
    """

    limits: ClassVar = {"strength": "[0, inf)"}
    kind: Literal["euler-maruyama"] = "euler-maruyama"
    diffusion: Literal["sde", "sigma"] = "sde"
    strength: float = 1.0

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        if s == 0 or (self.diffusion == "sde" and _ends(denoise, t, s)):
            return DDPM().step(denoise, x, t, s, None, noise)
        level, rates, ends = denoise.schedule(t), denoise.schedule.rates(t), denoise(x, t)
        # half = w / 2 sigma
        half = self.strength / 2 if self.diffusion == "sigma" else rates.sigma - rates.alpha / level.alpha * level.sigma
        x = x + (s - t) * (rates.alpha * ends.x0 + (rates.sigma + half) * ends.eps)
        return x + (2 * half * level.sigma * (t - s)).sqrt() * noise.normal(x.shape[1:], dtype=x.dtype), None


@dataclass(frozen=True, kw_only=True)
class ReverseDiffusion(Sampler):
    """The forward step's own discretisation run backwards: x_s = (2 - a) x - (G^2 / sigma_t) eps + G z, with
    a = alpha_t / alpha_s and G^2 = sigma_t^2 - a^2 sigma_s^2. Weak order 1, one call a step.

    On VE it is `ddpm` with the large variance. Song et al. 2021 (arXiv 2011.13456), eq. 46.
    """

    kind: Literal["reverse-diffusion"] = "reverse-diffusion"

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        if _ends(denoise, t, s):
            return DDPM().step(denoise, x, t, s, None, noise)
        schedule = denoise.schedule
        level, ends = schedule(t), denoise(x, t)
        keep = level.alpha / schedule(s).alpha
        # 1 - (alpha_t sigma_s / (alpha_s sigma_t))^2, without the cancellation.
        spread = level.sigma * (-(schedule.logsnr(t) - schedule.logsnr(s)).expm1()).sqrt()
        x = (2 - keep) * x - (spread**2 / level.sigma) * ends.eps
        return x + spread * noise.normal(x.shape[1:], dtype=x.dtype), None


def _norm(x: Tensor) -> Tensor:
    """The Euclidean norm of each sample, kept broadcastable."""
    return x.square().sum(dim=tuple(range(1, x.ndim)), keepdim=True).sqrt()


def _walk(schedule: NoiseSchedule, x: Tensor, t: Tensor, eps: Tensor, size: Tensor, z: Tensor) -> Tensor:
    """A Langevin step x + size score + sqrt(2 size) z."""
    return x - (size / schedule(t).sigma) * eps + (2 * size).sqrt() * z


@dataclass(frozen=True, kw_only=True)
class PredictorCorrector(Sampler):
    """`corrector_steps` Langevin steps at t, then a reverse-diffusion step from t to s.

    The Langevin step is 2 (alpha_t / alpha_s)^2 (snr ||z|| / ||score||)^2, with norms per sample. Weak order 1 at best:
    the corrector has its own fixed point, (1 + snr^2) sigma^2 on a Gaussian. `corrector_steps` + 1 calls a step, and
    without them it is `reverse-diffusion`.
    Song et al. 2021 (arXiv 2011.13456), algorithms 2 to 5.
    """

    limits: ClassVar = {"snr": "[0, inf)", "corrector_steps": "[0, inf)"}
    kind: Literal["predictor-corrector"] = "predictor-corrector"
    snr: float = 0.16
    corrector_steps: int = 1

    @property
    def calls(self) -> int:
        return 1 + (self.corrector_steps if self.snr else 0)

    @property
    def order(self) -> int:
        return 0 if self.calls > 1 else 1

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        if not _ends(denoise, t, s):
            for index in range(self.calls - 1):
                x = self.correct(denoise, x, t, s, noise.fold("corrector", index))
        return ReverseDiffusion().step(denoise, x, t, s, None, noise)

    def correct(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        """One Langevin step at t, whose length the step to s bounds."""
        keep = denoise.schedule(t).alpha / denoise.schedule(s).alpha
        eps, z = denoise(x, t).eps, noise.normal(x.shape[1:], dtype=x.dtype)
        # ||score|| = ||eps|| / sigma; a sample at a mode has none, and must not be thrown to infinity.
        length = self.snr * denoise.schedule(t).sigma * _norm(z) / _norm(eps).clamp(min=1e-12)
        return _walk(denoise.schedule, x, t, eps, 2 * keep**2 * length**2, z)


@dataclass(frozen=True, kw_only=True)
class Langevin(Sampler):
    """Annealed Langevin dynamics: `inner_steps` Langevin steps of size `step_size` sigma^2 at t, then x alpha_s /
    alpha_t.

    Not a discretisation of the process: its bias stays as the grid is refined, unless the steps shrink. The last
    step ends with x0. Song & Ermon 2020 (arXiv 2006.09011), algorithm 1: step_size 0.062 on 232 levels from 50 to 0.01.
    """

    order = 0
    limits: ClassVar = {"inner_steps": "[1, inf)", "step_size": "(0, 1)"}
    kind: Literal["langevin"] = "langevin"
    inner_steps: int = 5
    step_size: float = 0.062

    @property
    def calls(self) -> int:
        return self.inner_steps

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise) -> Step:
        schedule = denoise.schedule
        if bool(schedule.logsnr(t).isinf()):
            return DDPM().step(denoise, x, t, s, None, noise)
        size = self.step_size * schedule(t).sigma ** 2
        for index in range(self.inner_steps):
            z = noise.normal(x.shape[1:], index, dtype=x.dtype)
            x = _walk(schedule, x, t, denoise(x, t).eps, size, z)
        if s == 0:
            return mix(schedule(s), denoise(x, t)), None
        return (schedule(s).alpha / schedule(t).alpha) * x, None


SAMPLERS = (EulerMaruyama, ReverseDiffusion, PredictorCorrector, Langevin)
