"""Which noise levels are trained on: the distribution of t, as the inverse of its cumulative distribution.

Randomness stays outside: `draw` turns uniform numbers into times, and says what undoes their choice. A new
distribution is a class and an entry in `TIMES`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from autoencoder.precision import double, double_device
from ldm.checks import Checked
from ldm.noise import Noise
from ldm.schedules import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class TimeSampling(Checked, ABC):
    """A distribution of training times on [t_min, 1].

    `stratified` takes one time from each of as many equally probable shares as the global batch has places, so that
    every batch sees every noise level (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
    """

    stratified: bool = False

    @abstractmethod
    def draw(self, u: Tensor, schedule: NoiseSchedule, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Times (B,) float64 at which a network may be called, and the factors (B,) on their losses that undo how often
        they come; from u (B,) uniform in (0, 1) and what has been `seen`, None for nothing."""

    def drawn(self, noise: Noise, schedule: NoiseSchedule, places: Places | None,
              seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """`draw` by the samples' own noise. Raises ValueError where stratified times lack the places of their samples.
        """
        u = noise.uniform((), "time")
        if self.stratified:
            if places is None:
                raise ValueError("stratified times need the places of the samples in their global batch")
            u = places.stratify(u)
        return self.draw(u, schedule, seen)

    @abstractmethod
    def start(self, device: torch.device | str = "cpu") -> Tensor | None:
        """What has been seen before the first step; None where times go by nothing that is seen."""


class Stated(TimeSampling):
    """A distribution that does not change."""

    @abstractmethod
    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The times of u: the inverse of the cumulative distribution."""

    def draw(self, u: Tensor, schedule: NoiseSchedule, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.sample(u, schedule), torch.ones_like(u)

    def start(self, device: torch.device | str = "cpu") -> Tensor | None:
        return None


class Places(NamedTuple):
    """Where samples stand in their global batch: positions (B,) int64 in [0, places), whoever computes them."""

    position: Tensor
    places: int

    def stratify(self, u: Tensor) -> Tensor:
        """(position + u) / places: still uniform over a batch, with one number in each of as many equal shares."""
        return (self.position.to(u.device) + u) / self.places


def shifted(t: Tensor, shift: float, schedule: NoiseSchedule) -> Tensor:
    """The time whose log-SNR is that of t less 2 ln(shift): shift t / (1 + (shift - 1) t) on `flow`.

    Esser et al. 2024 (arXiv 2403.03206), eq. 23; in log-SNR, Hoogeboom et al. 2023 (arXiv 2301.11093), section 3.1.
    Raises ValueError on a schedule that ends before pure noise: it has no time for the lowest of these log-SNRs.
    """
    if shift == 1:
        return t
    if not schedule.pure_noise:
        raise ValueError("shift: times can be shifted where the schedule ends in pure noise (flow, gvp, a DDPM table "
                         "with zero_terminal_snr), and this one ends before; a DDPM table itself takes schedule.shift")
    return schedule.time(schedule.logsnr(t) - 2 * math.log(shift))


@dataclass(frozen=True, kw_only=True)
class LogitNormal(Stated):
    """logit(t) ~ N(mean, std^2), then `shifted` towards noise. Esser et al. 2024 (arXiv 2403.03206), eq. 19."""

    kind: Literal["logit-normal"] = "logit-normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    limits: ClassVar = {"std": "(0, inf)", "shift": "(0, inf)"}

    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        return schedule.trained(shifted(t, self.shift, schedule))


@dataclass(frozen=True, kw_only=True)
class UniformTimes(Stated):
    """t uniform, then `shifted` towards noise; at shift 1 every entry of a DDPM table equally often."""

    kind: Literal["uniform"] = "uniform"
    shift: float = 1.0
    limits: ClassVar = {"shift": "(0, inf)"}

    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return schedule.trained(shifted(u, self.shift, schedule))


@dataclass(frozen=True, kw_only=True)
class Cubic(Stated):
    """t = 1 - v^3 with v uniform: 79 % of the times are above 1/2, where the layout is settled that a hint tells.

    Mou et al. 2023 (arXiv 2302.08453), section 3.4.
    """

    kind: Literal["cubic"] = "cubic"

    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        return schedule.trained(1 - (1 - u) ** 3)


@dataclass(frozen=True, kw_only=True)
class LogNormal(Stated):
    """ln(sigma / alpha) ~ N(mean, std^2). Karras et al. 2022 (arXiv 2206.00364), table 1: P_mean and P_std."""

    kind: Literal["log-normal"] = "log-normal"
    mean: float = -1.2
    std: float = 1.2
    limits: ClassVar = {"std": "(0, inf)"}

    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        logsnr = -2 * (self.mean + self.std * torch.special.ndtri(u))
        return schedule.trained(schedule.time(logsnr).clamp(0, 1))


@dataclass(frozen=True, kw_only=True)
class Karras(Stated):
    """(sigma / alpha)^(1 / rho) uniform from sigma_min to sigma_max, cut to what the schedule has: the levels of that
    grid equally often, however many they are. Song et al. 2023 (arXiv 2303.01469), algorithm 2."""

    kind: Literal["karras"] = "karras"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    limits: ClassVar = {"sigma_min": "(0, sigma_max)", "rho": "(0, inf)"}

    def sample(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        alpha, sigma = schedule(torch.tensor([schedule.t_min, 1], dtype=torch.float64))
        first, last = (sigma / alpha).tolist()
        low, high = (r ** (1 / self.rho) for r in (max(self.sigma_min, first), min(self.sigma_max, last)))
        return schedule.trained(schedule.time(-2 * self.rho * (low + u * (high - low)).log()).clamp(0, 1))


@dataclass(frozen=True, kw_only=True)
class LossAware(TimeSampling):
    """t in `bins` equal bins, each as probable as the root of its mean squared loss, and every loss divided by that.

    The mean of the loss stays that of uniform times; its variance falls. What has been seen is a tensor (bins,) that
    the caller keeps, zero where nothing was; until every bin was met, times are uniform. `floor` is the share of times
    that stays uniform. Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17, with an exponential mean in place of the
    last ten losses. Raises ValueError on nonsense.
    """

    kind: Literal["loss-aware"] = "loss-aware"
    bins: int = 100
    memory: float = 0.9
    floor: float = 0.01
    limits: ClassVar = {"bins": "[1, inf)", "memory": "[0, 1)", "floor": "(0, 1]"}

    def start(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.zeros(self.bins, dtype=torch.float64, device=double_device(device))

    def probabilities(self, seen: Tensor) -> Tensor:
        """Of each bin, (bins,), without a synchronisation."""
        flat = torch.full_like(seen, 1 / self.bins)
        wanted = seen.sqrt()
        aimed = self.floor * flat + (1 - self.floor) * wanted / wanted.sum().clamp(min=1e-300)
        return torch.where((seen > 0).all(), aimed, flat)

    def draw(self, u: Tensor, schedule: NoiseSchedule, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if seen is None:
            return schedule.trained(u), torch.ones_like(u)
        p = self.probabilities(seen)
        ends = p.cumsum(0)
        bin_ = torch.searchsorted(ends, u).clamp(max=self.bins - 1)
        inside = ((u - (ends - p)[bin_]) / p[bin_]).clamp(0, 1)
        return schedule.trained((bin_ + inside) / self.bins), 1 / (self.bins * p[bin_])

    def updated(self, seen: Tensor, t: Tensor, loss: Tensor,
                reduce: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """What has been seen after losses (B,), before their factors, at t (B,). `reduce` sums over all processes."""
        # Entry i of a table of T is trained for t in (i / T, (i + 1) / T], so a bin holds its upper end.
        bin_ = (t * self.bins - 1e-9).floor().long().clamp(0, self.bins - 1)
        sums = torch.zeros(2, self.bins, dtype=torch.float64, device=t.device)
        sums[0].index_add_(0, bin_, double(loss.detach()) ** 2)
        sums[1].index_add_(0, bin_, torch.ones_like(t))
        total, count = reduce(sums)
        mean = total / count.clamp(min=1)
        fresh = torch.where(seen > 0, self.memory * seen + (1 - self.memory) * mean, mean)
        return torch.where(count > 0, fresh, seen)


TIMES = (LogitNormal, UniformTimes, Cubic, LogNormal, Karras, LossAware)
