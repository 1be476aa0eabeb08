"""A process and what the network predicts of it: noising, targets, and the way back to both ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ldm.predictions import Prediction
from ldm.schedules import Level, NoiseSchedule, match


class Denoised(NamedTuple):
    """Both ends of x_t = alpha x0 + sigma eps as a denoiser sees them, shapes of x_t.

    `log_var_frac`, where the variance is learned, is u in log var = u log(large) + (1 - u) log(small) of a DDPM step.
    """

    x0: Tensor
    eps: Tensor
    log_var_frac: Tensor | None = None


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each pair of samples, kept broadcastable."""
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def with_x0(ends: Denoised, x0: Tensor, level: Level) -> Denoised:
    """Another x0, and the eps that makes up the same x_t with it: eps - (alpha / sigma) (x0' - x0)."""
    return ends._replace(x0=x0, eps=ends.eps - match(level.alpha / level.sigma, x0) * (x0 - ends.x0))


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """A schedule and a prediction. Times are float64, () or (B,), in [t_min, 1]; tensors (B, ...) keep their dtype.

    With `learned_variance` the network's output has twice the channels, the second half v in [-1, 1] giving
    log_var_frac = (v + 1) / 2 (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15).
    Raises ValueError when the prediction does not determine both ends everywhere on the schedule.
    """

    schedule: NoiseSchedule
    prediction: Prediction
    learned_variance: bool = False

    def __post_init__(self) -> None:
        if (reason := self.prediction.refusal(self.schedule)) is not None:
            raise ValueError(f"prediction {self.prediction.kind!r} {reason}")

    def perturb(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps."""
        alpha, sigma = self.schedule(t)
        return match(alpha, x0) * x0 + match(sigma, x0) * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """y = a x0 + b eps, what the network should answer."""
        a, b = self.prediction.coefficients(self.schedule(t), self.schedule.rates(t))
        return match(a, x0) * x0 + match(b, x0) * eps

    def recover(self, x_t: Tensor, y: Tensor, t: Tensor) -> Denoised:
        """Both ends from x_t and y: the inverse of [[alpha, sigma], [a, b]]."""
        (alpha, sigma), a, b, det = self._system(t)
        fraction = None
        if self.learned_variance:
            y, v = y.chunk(2, dim=1)
            fraction = (v.to(x_t.dtype) + 1) / 2
        y = y.to(x_t.dtype)
        x0 = match(b / det, x_t) * x_t - match(sigma / det, x_t) * y
        eps = match(alpha / det, x_t) * y - match(a / det, x_t) * x_t
        return Denoised(x0, eps, fraction)

    def condition(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_in x_t, noise level) as the network is given them."""
        return match(self.schedule.input_scale(t), x_t) * x_t, self.schedule.noise_level(t)

    def gains(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The squared errors of (x0, eps) that one unit of squared error in y stands for, of the shape of t."""
        (alpha, sigma), _, _, det = self._system(t)
        return (sigma / det) ** 2, (alpha / det) ** 2

    def _system(self, t: Tensor) -> tuple[Level, Tensor, Tensor, Tensor]:
        level = self.schedule(t)
        a, b = self.prediction.coefficients(level, self.schedule.rates(t))
        return level, a, b, level.alpha * b - level.sigma * a
