"""What every objective is: the loss of a network on a batch of latents, at times and with noise drawn for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Denoiser, Network
from ldm.diffusion import Diffusion
from ldm.jumps import SPAN, Aim, Jumping, Reading
from ldm.noise import Noise
from ldm.pairing import Pairing
from ldm.representation import Represented
from ldm.teacher import Teacher
from ldm.times import Places, TimeSampling
from ldm.uncertainty import Weighed
from ldm.weighting import Weighting

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # times of the validation loss

Trained = Network | Callable[[Tensor, Tensor, Cond], Tensor | Weighed | Represented]


class Draw(NamedTuple):
    """What a batch is trained on: times (B,) float64, noise (B, ...), the factor (B,) that undoes their choice; and, by
    name, what else an objective draws."""

    t: Tensor
    eps: Tensor
    factor: Tensor
    more: Mapping[str, Tensor] = {}


class Beside(NamedTuple):
    """What an objective may ask beside the network that learns, in the 0-based `step` of `steps`.

    `bare`: that network outside its process wrapper, for what nothing is learned of; `networks`: its companions by
    name, each in its wrapper; `teacher`: the guided model that a student learns from.
    """

    step: int = 0
    steps: int = 1
    bare: Trained | None = None
    networks: Mapping[str, Trained] = {}
    teacher: Teacher | None = None


ALONE = Beside()


@dataclass(frozen=True)
class Companion:
    """A network beside the one that learns, begun as its copy and kept in checkpoints.

    Between the 0-based `step` of `steps` and the one before it keeps the share `kept(step, steps)` of itself, and takes
    the rest from the one that learns, as it is by then; or, with none, it learns by gradients of its own, at `rate`
    times the learning rate.
    """

    kept: Callable[[int, int], float] | None = None
    rate: float = 1.0


class Losses(NamedTuple):
    """(B,) float32 each: what is minimised, and the same before the factor that undoes the choice of times; by name,
    parts of it to be told on their own, where they differ in kind or from step to step; and, where features are
    compared, what of it they cost."""

    total: Tensor
    seen: Tensor
    parts: Mapping[str, Tensor] = {}
    features: Tensor | None = None


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
    def losses(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw, beside: Beside = ALONE) -> Losses:
        """What a batch costs at the times and with the noise drawn for it."""

    @abstractmethod
    def answered(self, backbone: Trained, x0: Tensor, cond: Cond, draw: Draw) -> tuple[Tensor, Draw]:
        """Latents and a draw that are as noisy as these, and whose target is this network's answer to them: what a
        network loses on them is its distance to the answer. Raises ValueError where its variance is learned."""

    @abstractmethod
    def at(self, backbone: Trained, x0: Tensor, cond: Cond, t: Tensor, eps: Tensor, beside: Beside = ALONE) -> Tensor:
        """The unweighted error at given times (B,) and noise, (B,) float32: what validation by noise level reads."""


class ObjectiveConfig(ABC):
    """The config of an objective: a frozen dataclass with a `kind`, in the `OBJECTIVES` of its module."""

    kind: str
    reads: ClassVar[tuple[str, ...]] = ()  # the extras of a condition, (B,) numbers, that its network is made to read
    taught: ClassVar[Literal["no", "either", "yes"]] = "no"  # whether it learns from a teacher, or from data as well
    pairs: int = 0  # the pairs of noise and data that a teacher draws before, which it learns on
    reading: Reading | None = None  # how its network's answers are understood, where they are jumps

    @property
    def drawn_in(self) -> tuple[int, ...]:
        """The numbers of steps that its model is taught to be drawn in; none where any will do."""
        return ()

    def plan(self, step: int, steps: int) -> str:
        """Where it is at a 0-based step of all, in words, where it does one thing after the other: a training that goes
        on with other `steps` must be there, too."""
        return ""

    @property
    def aim(self) -> Aim:
        """Where its model's answer goes, where it jumps: anywhere if it is told how far, else to the clean end."""
        return "any" if SPAN in self.reads else "clean"

    @property
    def group(self) -> int:
        """Consecutive samples that are held against each other: every micro-batch is a multiple of it."""
        return 1

    @property
    def own_grid(self) -> bool:
        """Whether its model is taught at the times of the grid `uniform` of its steps alone."""
        return self.aim == "next"

    def companions(self) -> Mapping[str, Companion]:
        """The networks that are trained or averaged beside the one that learns, by name."""
        return {}

    def denoiser(self, backbone: Network, diffusion: Diffusion) -> Denoiser:
        """The denoiser that its network is: one that jumps, where it says how it is read."""
        if self.reading is None:
            return Denoiser(backbone, diffusion)
        return Jumping(backbone, diffusion, self.reading, SPAN in self.reads, self.aim, self.own_grid)

    @abstractmethod
    def build(self, *, diffusion: Diffusion, times: TimeSampling, weighting: Weighting, pairing: Pairing) -> Objective:
        """The objective on a process. Raises ValueError where these do not go together."""
