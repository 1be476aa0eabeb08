"""UniPC: a multistep predictor whose next network call also corrects the step just made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.noise import Noise
from ldm.samplers.base import BySettings, Memory, Sampler
from ldm.samplers.dpm import Past, half_logsnr


@dataclass(frozen=True, kw_only=True)
class UniPC(Sampler):
    """UniP of `solver_order` p, then UniC of the same p unless `corrector` is off, with B(h) = e^h - 1 ("bh2").

    x_s = (sigma_s / sigma_t) x - alpha_s expm1(-h) (D + sum_i rho_i (D_i - D) / r_i), r_i = (lambda_i - lambda_t) / h;
    the corrector adds the estimate at s to the sum, with r = 1. One call a step (and one more where the grid ends above
    t_min): the corrected x keeps the estimate made at the predicted one. Order p, or p + 1 corrected; the early steps
    are of lower order. UniP-1 is DDIM, UniP-2 is `dpmpp-2m`. Zhao et al. 2023 (arXiv 2302.04867), algorithms 5 and 6.
    """

    calls: ClassVar[int] = 1
    rises: ClassVar[bool] = True
    kind: Literal["unipc"] = "unipc"
    solver_order: int = 2
    corrector: bool = True

    def __post_init__(self) -> None:
        if self.solver_order not in (1, 2, 3):
            raise ValueError(f"unipc solver_order must be 1, 2 or 3, got {self.solver_order}")

    @BySettings
    def order(self) -> int:
        # What may be relied on: how far the first steps, of lower order, hold the rest back depends on the grid.
        return min(self.solver_order + self.corrector, 2)

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: tuple[Past, ...] | None,
             noise: Noise) -> tuple[Tensor, Memory]:
        schedule, lam = denoise.schedule, half_logsnr(denoise, t)
        past = memory or (Past(denoise(x, t).x0, lam),)
        level, now = schedule(s), past[0]
        h = half_logsnr(denoise, s) - lam
        base = (level.sigma / schedule(t).sigma) * x - (level.alpha * (-h).expm1()) * now.x0
        if not bool(h.isfinite()):
            # Over an infinite end the rule is of order 1, and an estimate at that end is worth no difference.
            return base, self._next(denoise, base, s, ())
        older = past[1 : self.solver_order]
        ratios = [((other.lam - lam) / h).item() for other in older]
        slopes = [(other.x0 - now.x0) / ratio for other, ratio in zip(older, ratios, strict=True)]
        scale = level.alpha * -(-h).expm1()
        predicted = base + _combine(scale, _weights(ratios, h.item()), slopes)
        estimates = self._next(denoise, predicted, s, past)
        if estimates is None or not self.corrector:
            return predicted, estimates
        slopes.append(estimates[0].x0 - now.x0)
        return base + _combine(scale, _weights([*ratios, 1.0], h.item()), slopes), estimates

    def _next(self, denoise: Denoise, x: Tensor, s: Tensor, past: tuple[Past, ...]) -> tuple[Past, ...] | None:
        """The estimates of x0 at s and before it, newest first; None where the network may not be called."""
        if s < denoise.schedule.t_min:
            return None
        return Past(denoise(x, s).x0, half_logsnr(denoise, s)), *past[: self.solver_order - 1]


def _combine(scale: Tensor, weights: list[float], slopes: list[Tensor]) -> Tensor | float:
    return sum((slope * (scale * weight) for weight, slope in zip(weights, slopes, strict=True)), 0.0)


def _weights(ratios: list[float], h: float) -> list[float]:
    """rho of sum_i rho_i r_i^(k-1) = k! phi_{k+1}(-h) / phi_1(-h), k = 1, 2, ...; one half where there is one ratio."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    phi, wanted = math.expm1(-h) / -h, []
    first = phi
    for k in range(1, len(ratios) + 1):
        phi = (phi - 1 / math.factorial(k)) / -h
        wanted.append(math.factorial(k) * phi / first)
    powers = [[ratio**k for ratio in ratios] for k in range(len(ratios))]
    system = torch.tensor(powers, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    return list(torch.linalg.solve(*system).tolist())
