"""What a stage gives the loop: its data, its networks, its gradient step and its evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from training.data.images import Images
from training.data.latents import Latents
from training.data.samples import Batch
from training.loop.rollback import Rollback

if TYPE_CHECKING:
    from accelerate import Accelerator

    from training.models.captions_read import CaptionTally


class Stage(ABC):
    """One kind of training: it declares what is trained, averaged and frozen, and `loop/wrapping.py` wraps it."""

    accelerator: Accelerator
    dataset: Images | Latents
    networks: dict[str, nn.Module]  # everything trained, by the name it has in checkpoints
    averaged: dict[str, nn.Module]  # the part of it that EMA averages and export uses
    frozen: Iterable[nn.Module] = ()  # what is only called, to be moved to the device
    wrapped: dict[str, Any]  # the networks as the processes share them, by the same names
    optimizers: dict[str, tuple[list[str], float]]  # name -> (networks it trains, learning-rate multiple)
    score: tuple[str, float]  # the validation number that names the best checkpoint, and its sign: lower is better
    training_score: Callable[[], float | None] | None = None  # that number on training samples, to hold it beside
    audit = ""  # what is added to the advice against over-fitting
    rollback: Rollback | None = None  # what brings a run back whose score has become worse
    tally: CaptionTally | None = None  # of captions, where there are some
    group: int = 1  # consecutive samples that a loss couples: every micro-batch is a multiple of it
    unused_gradients: bool = False  # whether a step may leave parameters without gradients: processes must look

    @abstractmethod
    def connect(self) -> None:
        """Take the process wrappers of `wrapped` into use, and move own tensors to the accelerator's device."""

    @abstractmethod
    def compiled_parts(self) -> Iterable[nn.Module]:
        """The modules that `train.compile` compiles in place."""

    def units(self) -> Iterable[nn.Module]:
        """The parts whose weights processes bring together one after the other, where they share them out."""
        return ()

    @abstractmethod
    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch, `share` of the global batch's; return its mean losses (0-dim)."""

    @abstractmethod
    def after_backward(self, step: int) -> None:
        """Called once a step that is taken, gradients complete, before the optimisers; does nothing a second time."""

    def after_step(self, step: int, *, taken: bool) -> None:  # noqa: B027  # in most stages nothing follows the weights
        """Called at the end of every step, its weights moved where it was `taken`: to ready what the next one asks."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain state beyond weights, for checkpoints."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""

    @abstractmethod
    def evaluate(self, folder: Path) -> dict[str, float]:
        """Write pictures into `folder`, return validation numbers. Runs in the main process, with averaged
        weights and outside the training's autocast: in float32."""


class StatelessStage(Stage):
    """A stage whose losses couple no batch, and which keeps nothing beyond its weights."""

    def after_backward(self, step: int) -> None:
        """Nothing is measured over a batch."""

    def state(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """There is none."""
