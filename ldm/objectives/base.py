"""What every objective is: the loss of a network on a batch of latents, at times and with noise drawn for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Network
from ldm.diffusion import Diffusion
from ldm.noise import Noise
from ldm.pairing import Pairing
from ldm.times import Places, TimeSampling
from ldm.uncertainty import Weighed
from ldm.weighting import Weighting

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # times of the validation loss

Trained = Network | Callable[[Tensor, Tensor, Cond], Tensor | Weighed]


class Draw(NamedTuple):
    """What a batch is trained on: times (B,) float64, noise (B, ...), and the factor (B,) that undoes their choice."""

    t: Tensor
    eps: Tensor
    factor: Tensor


class Losses(NamedTuple):
    """(B,) float32 each: what is minimised, and the same before the factor that undoes the choice of times."""

    total: Tensor
    seen: Tensor


class Objective(ABC):
    """A loss (B,) of a network, latents x0 (B, ...), their condition and what was drawn for them."""

    def __call__(self, backbone: Trained, x0: Tensor, cond: Cond, noise: Noise, places: Places | None = None) -> Tensor:
        """The loss of each sample, (B,) float32. `places` in the global batch are needed where times are stratified."""
        return self.losses(backbone, x0, cond, self.draw(x0, noise, places, cond=cond)).total

    @abstractmethod
    def draw(self, x0: Tensor, noise: Noise, places: Places | None = None, seen: Tensor | None = None,
             cond: Cond | Sequence[str] | None = None) -> Draw:
        """Times and noise for a batch; `seen` is what loss-aware times go by, none being uniform times, and `cond` what
        the samples are conditioned on, encoded or as captions: noise is paired among equals."""

    @abstractmethod
    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw) -> Losses:
        """What a batch costs at the times and with the noise drawn for it."""

    @abstractmethod
    def answered(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw) -> tuple[Tensor, Draw]:
        """Latents and a draw that are as noisy as these, and whose target is this network's answer to them: what a
        network loses on them is its distance to the answer. Raises ValueError where its variance is learned."""

    @abstractmethod
    def at(self, backbone: Trained, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor) -> Tensor:
        """The unweighted error at given times (B,) and noise, (B,) float32: what validation by noise level reads."""


class ObjectiveConfig(ABC):
    """The config of an objective: a frozen dataclass with a `kind`, in the `OBJECTIVES` of its module."""

    kind: str

    @abstractmethod
    def build(self, *, diffusion: Diffusion, times: TimeSampling, weighting: Weighting, pairing: Pairing) -> Objective:
        """The objective on a process. Raises ValueError where these do not go together."""
