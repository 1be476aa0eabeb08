"""The one training loop: both stages run through these lines."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training import optim
from training.checkpoint import Checkpoint, Checkpoints
from training.data import Batch, Images, Latents, stream
from training.ema import EMA
from training.errors import UserError, explained
from training.faults import fault
from training.files import disk_error
from training.journal import Journal
from training.order import Batches, DataOrder
from training.posthoc import PowerAverages
from training.settings import Optimizer, Train
from training.signals import Signals
from training.watchdogs import Watchdogs, explain

if TYPE_CHECKING:
    from accelerate import Accelerator


COMPARED_EVERY = 100  # steps after which processes compare their weights, besides the first step and each save


class Stage(ABC):
    """What a stage gives the loop: its data, its networks, its gradient step and its evaluation."""

    dataset: Images | Latents
    networks: dict[str, nn.Module]  # everything trained, by the name it has in checkpoints
    averaged: dict[str, nn.Module]  # the part of it that EMA averages and export uses
    wrapped: dict[str, Any]  # the same networks as the processes share them
    optimizers: dict[str, tuple[list[str], float]]  # name -> (networks it trains, learning-rate multiple)
    score: tuple[str, float]  # the validation number that names the best checkpoint, and its sign: lower is better

    @abstractmethod
    def backward(self, batch: Batch, step: int, share: float) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch, `share` of the global batch's; return its mean losses (0-dim)."""

    @abstractmethod
    def after_backward(self, step: int) -> None:
        """Called once a step, gradients complete, before the optimisers."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain state beyond weights, for checkpoints."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""

    @abstractmethod
    def evaluate(self, folder: Path) -> dict[str, float]:
        """Write pictures into `folder`, return validation numbers. Runs in the main process with averaged weights."""

    @abstractmethod
    def wrap(self, accelerator: Accelerator) -> None:
        """Replace the callables used by `backward` by their process wrappers."""


class Loop:
    """Steps from a checkpoint (or 0) to `train.max_steps`: backward, clip, check, step, average, log, look, save."""

    def __init__(
        self,
        stage: Stage,
        train: Train,
        optimizer: Optimizer,
        accelerator: Accelerator,
        run: Path,
        accumulation: int,
        micro: int,
    ) -> None:
        self.stage, self.train, self.settings, self.accelerator, self.run = stage, train, optimizer, accelerator, run
        self.accumulation, self.micro = accumulation, micro
        stage.wrap(accelerator)
        self.ema = EMA(stage.averaged, train.ema)  # after the move to the device, where averages belong too
        self.powers = PowerAverages(stage.averaged, train.ema_lengths)
        self.optimizers = {
            name: optim.adamw(optimizer, [stage.networks[n] for n in networks], scale=scale)
            for name, (networks, scale) in stage.optimizers.items()
        }
        self.checkpoints = Checkpoints(run, train.keep_last, keep_best=train.keep_best)
        self.journal = Journal(run, train, accelerator)
        self.watchdogs = Watchdogs(run, train, accelerator)
        self.signals = Signals()
        self.base = (0, 0)  # of the data order
        self.batches = self.planned(0)
        self.done, self.saving = 0, False
        self.scored: tuple[int, float] | None = None  # step and score of the last validation
        self.losses: list[Tensor] = []  # of this step's micro-batches, each the sum of all it told

    def planned(self, start: int) -> Batches:
        """This process's micro-batches from step `start` on."""
        order = DataOrder(len(self.stage.dataset), self.train.batch_size, self.train.seed, self.base)
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        return Batches(order, self.micro, self.accumulation, process, processes, start, self.train.max_steps)

    def fit(self, start: int) -> int:
        """Train from step `start` to the end. Returns the signal number that stopped it, or 0.

        Raises UserError before the optimiser step where a loss or gradient is not finite (exit 5), where memory runs
        out (6) and where another process is gone (1).
        """
        self.done, self.batches = start, self.planned(start)
        pin = self.accelerator.device.type == "cuda"
        batches = stream(self.stage.dataset, self.batches, self.train.num_workers, pin=pin)
        self.signals.listen()
        try:
            return self._steps(start, batches)
        except RuntimeError as failure:
            told = explain(failure, self.done, self.micro, self.train.batch_size)
            if told is failure:
                raise
            raise told from failure

    def _steps(self, start: int, batches: Iterator[Batch]) -> int:
        train = self.train
        if start == 0:
            with explained("change the config"):  # the first pictures try sampler, grid and guidance together
                self.look(0)
        for step in range(start, train.max_steps):
            rate = optim.learning_rate(self.settings, step, train.max_steps)
            values = self.gradients(batches, step)
            norms = self.step(step, rate)
            self.journal.record(step + 1, {**values, **norms}, rate)
            done = self.done = step + 1
            last = done == train.max_steps
            if done % train.sample_every == 0 or last:
                self.look(done)
            stopped = self._stopped()
            if self.accelerator.is_main_process and (done % train.ema_every == 0 or last):
                self.powers.keep(self.run, done)
            saving = done % train.save_every == 0 or last or bool(stopped) or self.saving
            if saving or step == start or done % COMPARED_EVERY == 0:
                self.watchdogs.compare(done, self.shared())
            if saving:
                self.save(done)
            if stopped:
                return stopped
        return 0

    def gradients(self, batches: Any, step: int) -> dict[str, Tensor]:
        """All backward passes of one step; the process wrappers average on the last."""
        fault("step")
        sums: dict[str, Tensor] = {}
        self.losses.clear()
        for part in range(self.accumulation):
            with self.journal.waiting():
                batch: Batch = next(batches)
            with ExitStack() as stack:
                if part < self.accumulation - 1:
                    for network in self.stage.wrapped.values():
                        stack.enter_context(self.accelerator.no_sync(network))
                values = self.stage.backward(batch, step, 1 / self.accumulation)
            self.losses.append(torch.stack([value.detach().float() for value in values.values()]).sum())
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / self.accumulation
        self.stage.after_backward(step)
        return sums

    def step(self, step: int, rate: float) -> dict[str, Tensor]:
        """Clip and check gradients, step the optimisers, move the average. Returns what is to be logged of it."""
        scaler, told = self.accelerator.scaler, {}
        moving = {name: learning(optimizer) for name, optimizer in self.optimizers.items()}
        for name, optimizer in self.optimizers.items():
            if scaler and moving[name]:
                scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(moving[name], self.settings.clip or math.inf)
            told[f"grad_norm/{name}"] = norm.to(self.accelerator.device)
            optim.set_learning_rate(optimizer, rate)
        try:
            taken = self.watchdogs.judge(step, self.losses, told, self.keys)
        except UserError:
            self.journal.flush(step)  # what led to it; every process is here
            raise
        for name, optimizer in self.optimizers.items():
            if moving[name] and taken:
                scaler.step(optimizer) if scaler else optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if scaler:
            scaler.update()
        if self.train.ema:
            self.ema.update()
        self.powers.update(step + 1)
        return told if taken else {**told, "skipped": torch.ones((), device=self.accelerator.device)}

    def keys(self, process: int, part: int) -> list[str]:
        """The samples of one micro-batch of the step being taken, by key."""
        return [self.stage.dataset.shards.key(s.index) for s in self.batches.share(self.done, part, process)]

    def shared(self) -> dict[str, Tensor]:
        """What must be the same in all processes: trained weights and their averages."""
        live = {f"{n}.{k}": p for n, network in self.stage.networks.items() for k, p in network.named_parameters()}
        return {**live, **{f"ema.{key}": value for key, value in self.ema.shadow.items()}, **self.powers.tensors()}

    def look(self, step: int) -> None:
        """Pictures and validation with the averaged weights, in the main process; the others wait."""
        self.journal.flush(step)  # so that metrics.jsonl is in the order of steps, however often it is flushed
        if self.accelerator.is_main_process:
            folder = self.run / "samples" / f"step-{step:08d}"
            try:
                fault("samples")
                folder.mkdir(parents=True, exist_ok=True)
                with self.ema.applied(), torch.no_grad():
                    numbers = self.stage.evaluate(folder)
            except OSError as failure:
                raise disk_error(folder, failure) from None
            name, sign = self.stage.score
            self.scored = step, sign * numbers[name]
            self.journal.look(step, numbers, folder)
        self.accelerator.wait_for_everyone()

    def save(self, step: int) -> None:
        """Write a checkpoint (main process); the others wait."""
        self.journal.flush(step)
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.snapshot(step))
        self.accelerator.wait_for_everyone()

    def names(self) -> dict[int, str]:
        """id(parameter) -> its name in checkpoints."""
        return {
            id(p): f"{n}.{key}" for n, network in self.stage.networks.items() for key, p in network.named_parameters()
        }

    def snapshot(self, step: int) -> Checkpoint:
        """Everything the run needs to go on from `step`."""
        model = {
            f"{n}.{key}": v for n, network in self.stage.networks.items() for key, v in network.state_dict().items()
        }
        names = self.names()
        moments = {f"{name}/{key}": v for name, o in self.optimizers.items() for key, v in optim.pack(o, names).items()}
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else {}
        state = {
            "ema_updates": self.ema.updates,
            "scaler": scaler,
            "stage": self.stage.state(),
            "journal": self.journal.state(),
            "watchdogs": self.watchdogs.state(),
            "place": self.batches.order.place(step),
            "score": self.scored[1] if self.scored and self.scored[0] == step else None,
        }
        averages = {**self.ema.shadow, **self.powers.tensors()}
        return Checkpoint(step, {"model": model, "ema": averages, "optimizer": moments}, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take back a snapshot, in every process."""
        for n, network in self.stage.networks.items():
            prefix = f"{n}."
            network.load_state_dict(
                {k.removeprefix(prefix): v for k, v in checkpoint.tensors["model"].items() if k.startswith(prefix)}
            )
        names = self.names()
        for name, optimizer in self.optimizers.items():
            prefix = f"{name}/"
            mine = {
                k.removeprefix(prefix): v for k, v in checkpoint.tensors["optimizer"].items() if k.startswith(prefix)
            }
            optim.unpack(optimizer, names, mine)
        self.ema.load(dict(checkpoint.tensors["ema"]), int(checkpoint.state["ema_updates"]))
        self.powers.load(checkpoint.tensors["ema"])
        if self.accelerator.scaler and checkpoint.state["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        self.stage.load_state(checkpoint.state["stage"])
        self.journal.resume(checkpoint.step, checkpoint.state["journal"])
        if "watchdogs" in checkpoint.state:  # not in checkpoints of earlier versions
            self.watchdogs.load(checkpoint.state["watchdogs"])
            self.base = checkpoint.step, int(checkpoint.state["place"])

    def _stopped(self) -> int:
        """The signal any process was sent, known to all of them at the same step; also whether to save (`saving`)."""
        wishes = [self.signals.stop, int(self.signals.take_save())]
        if self.accelerator.num_processes > 1:
            everyone = self.accelerator.gather(torch.tensor([wishes], device=self.accelerator.device))
            wishes = everyone.max(dim=0).values.tolist()
        self.saving = bool(wishes[1])
        return wishes[0]


def learning(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that have a gradient: none of a discriminator's before it starts."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
