"""What every process is: x_t = alpha(t) x0 + sigma(t) eps, with t = 0 clean and t = 1 noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from autoencoder.precision import double_device
from ldm.checks import Checked


class Level(NamedTuple):
    """The two coefficients of x_t = alpha x0 + sigma eps, float64, of the shape of t."""

    alpha: Tensor
    sigma: Tensor


def match(coefficient: Tensor, x: Tensor) -> Tensor:
    """A float64 coefficient, () or (B,), ready to multiply x (B, ...): cast to x's dtype only here.

    A scalar stays on the CPU, from where it multiplies a tensor on any device without a synchronisation.
    """
    if coefficient.ndim == 0:
        return coefficient
    return coefficient.to(x.device, x.dtype, non_blocking=True).view(-1, *[1] * (x.ndim - 1))


def per_sample(level: Tensor, x: Tensor) -> Tensor:
    """A noise level as the network is told it with x (B, ...): (B,) on x's device, float64 where that has such numbers,
    else float32. A CPU scalar goes there as a kernel argument, without waiting."""
    dtype = torch.float32 if x.device != double_device(x.device) else level.dtype
    if level.ndim == 0 and level.device != x.device:
        return torch.full((len(x),), level.item(), dtype=dtype, device=x.device)
    return level.to(x.device, dtype, non_blocking=True).expand(len(x))


class NoiseSchedule(Checked, ABC):
    """alpha(t) and sigma(t) on [0, 1], with strictly decreasing logsnr(t) = 2 ln(alpha / sigma).

    Every method takes and returns float64 tensors of one shape. A network is called on [t_min, 1] only; t = 0 is the
    clean end (alpha 1, sigma 0), which samplers land on from x0.
    """

    @property
    def steps(self) -> int:
        """T: the entries of a table, and 1000 for a process in continuous time, whose network counts the same."""
        return 1000

    @property
    @abstractmethod
    def t_min(self) -> float:
        """The least time at which a network is called."""

    @property
    @abstractmethod
    def pure_noise(self) -> bool:
        """Whether alpha(1) = 0, so that logsnr(1) is minus infinity: a declaration, never a floating-point test."""

    @property
    @abstractmethod
    def prior_std(self) -> float:
        """The standard deviation of the Gaussian from which sampling starts at t = 1, for data of about unit scale."""

    @abstractmethod
    def __call__(self, t: Tensor) -> Level:
        """The level at t."""

    @abstractmethod
    def rates(self, t: Tensor) -> Level:
        """(d alpha / dt, d sigma / dt), on [t_min, 1]."""

    @abstractmethod
    def logsnr(self, t: Tensor) -> Tensor:
        """2 ln(alpha / sigma): plus infinity at t = 0, minus infinity at t = 1 where `pure_noise`."""

    @abstractmethod
    def time(self, logsnr: Tensor) -> Tensor:
        """The inverse of `logsnr`."""

    @abstractmethod
    def trained(self, t: Tensor) -> Tensor:
        """The time at which a network is trained when t in [0, 1] is drawn."""

    @abstractmethod
    def noise_level(self, t: Tensor) -> Tensor:
        """t as the network sees it, in the units that other libraries' weights expect."""

    @abstractmethod
    def input_scale(self, t: Tensor) -> Tensor:
        """c_in: what x_t is multiplied by on its way into the network."""


class Bounded(NoiseSchedule):
    """A process whose x_t has about the variance of the data: the network sees x_t as it is."""

    prior_std = 1.0

    def input_scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class Continuous(Bounded):
    """Such a process defined at every t in [0, 1]: the network sees 1000 t."""

    def trained(self, t: Tensor) -> Tensor:
        return t.clamp(self.t_min, 1)

    def noise_level(self, t: Tensor) -> Tensor:
        return 1000 * t
