"""All that moves in a training, gathered into a checkpoint and taken back from one: the only place that does either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from training.loop import optim
from training.loop.books import Books
from training.loop.ema import EMA
from training.loop.overfitting import Overfitting
from training.loop.power_ema import PowerAverages
from training.loop.sharding import is_sharded
from training.loop.stage import Stage
from training.loop.watchdogs import Watchdogs
from training.models.folders import fill
from training.runs import parts
from training.runs.checkpoint import Checkpoint
from training.runs.journal import Journal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TrainingState:
    """Networks, averages, optimisers, loss scale; the plain state of stage, journal, watchdogs, books, validation."""

    stage: Stage
    ema: EMA
    powers: PowerAverages
    optimizers: Mapping[str, torch.optim.Optimizer]
    scaler: Any  # of fp16, or None
    journal: Journal
    watchdogs: Watchdogs
    books: Books
    overfitting: Overfitting = field(default_factory=Overfitting)

    def snapshot(self, step: int, place: Mapping[str, Any]) -> Checkpoint:
        """All a run needs to go on from `step`: its tensors themselves, not copies; `place` is the loop's own part."""
        state = {
            "ema_updates": self.ema.updates,
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "stage": self.stage.state(),
            "journal": self.journal.state(),
            "watchdogs": self.watchdogs.state(),
            "books": self.books.state(),
            "overfitting": self.overfitting.state(),
            **place,
        }
        tensors = {"model": self._weights(), "ema": self._averages(), "optimizer": self._moments()}
        return Checkpoint(step, tensors, state)

    def restore(self, checkpoint: Checkpoint, source: Path) -> None:
        """The inverse of `snapshot`, in every process. Raises UserError where the weights of `source` do not fit."""
        state = checkpoint.state
        if self.shared:
            self._take_parts(source, int(state["ema_updates"]))
        else:
            self._take_weights(checkpoint.tensors["model"], source)  # one file after another: none is held longer
            self._take_moments(checkpoint.tensors["optimizer"])
            self._take_averages(checkpoint.tensors["ema"], int(state["ema_updates"]))
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.stage.load_state(state["stage"])
        self.journal.resume(checkpoint.step, state["journal"])
        if "watchdogs" in state:  # not in checkpoints of earlier versions
            self.watchdogs.load(state["watchdogs"])
        self.books.load(state.get("books", {}))
        self.overfitting.load(state.get("overfitting", {}))

    @property
    def shared(self) -> bool:
        """Whether the processes share out weights, averages and moments."""
        return is_sharded(self.ema.shadow)

    def _take_parts(self, folder: Path, updates: int) -> None:
        """What this process is to hold, and no more, in place; the checkpoint may be in parts or whole."""
        parts.read_into(folder, "model", self._weights())
        parts.read_into(folder, "ema", self._averages())
        self.ema.updates = updates
        for name, optimizer in self.optimizers.items():
            optim.blank(optimizer, self._names(), _under(f"{name}/", parts.sizes(folder, "optimizer")))
        parts.read_into(folder, "optimizer", self._moments())

    def _weights(self) -> dict[str, Tensor]:
        networks = self.stage.networks.items()
        return {f"{n}.{key}": value for n, network in networks for key, value in network.state_dict().items()}

    def _averages(self) -> dict[str, Tensor]:
        return {**self.ema.shadow, **self.powers.tensors()}

    def _moments(self) -> dict[str, Tensor]:
        packed = {name: optim.pack(optimizer, self._names()) for name, optimizer in self.optimizers.items()}
        return {f"{name}/{key}": value for name, part in packed.items() for key, value in part.items()}

    def _take_weights(self, tensors: Mapping[str, Tensor], source: Path) -> None:
        for name, network in self.stage.networks.items():
            fill(network, _under(f"{name}.", tensors), source)

    def _take_moments(self, tensors: Mapping[str, Tensor]) -> None:
        for name, optimizer in self.optimizers.items():
            optim.unpack(optimizer, self._names(), _under(f"{name}/", tensors))

    def _take_averages(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        self.ema.load(dict(tensors), updates)
        self.powers.load(tensors)

    def replicated(self) -> dict[str, Tensor]:
        """What must be the same in all processes: trained weights and their averages; of those that are shared out, of
        which no two processes hold the same, what is beside them: buffers and counts."""
        if self.shared:
            every = {**self._weights(), **self._moments(), "ema_updates": torch.tensor(self.ema.updates)}
            return {name: value for name, value in every.items() if not is_sharded({name: value})}
        live = {f"{n}.{k}": p for n, network in self.stage.networks.items() for k, p in network.named_parameters()}
        return {**live, **{f"ema.{key}": value for key, value in self.ema.shadow.items()}, **self.powers.tensors()}

    def _names(self) -> dict[int, str]:
        """id(parameter) -> its name in checkpoints."""
        networks = self.stage.networks.items()
        return {id(p): f"{n}.{key}" for n, network in networks for key, p in network.named_parameters()}


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
