"""The one training loop: both stages run through these lines."""

from __future__ import annotations

import math
import signal
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from training import optim
from training.checkpoint import Checkpoint, Checkpoints
from training.data import Batch, Images, Latents, stream
from training.ema import EMA
from training.errors import NUMERICAL, UserError, explained
from training.journal import Journal
from training.order import Batches, DataOrder
from training.posthoc import PowerAverages
from training.settings import Optimizer, Train

if TYPE_CHECKING:
    from accelerate import Accelerator


class Stage(ABC):
    """What a stage gives the loop: its data, its networks, its gradient step and its evaluation."""

    dataset: Images | Latents
    networks: dict[str, nn.Module]  # everything trained, by the name it has in checkpoints
    averaged: dict[str, nn.Module]  # the part of it that EMA averages and export uses
    wrapped: dict[str, Any]  # the same networks as the processes share them
    optimizers: dict[str, tuple[list[str], float]]  # name -> (networks it trains, learning-rate multiple)

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
        self.checkpoints = Checkpoints(run, train.keep_last)
        self.journal = Journal(run, train, accelerator)
        self.signal = 0

    def fit(self, start: int) -> int:
        """Train from step `start` to the end. Returns the signal number that stopped it, or 0.

        Raises UserError (exit 5) before the optimiser step where a loss or gradient is not finite.
        """
        train, stage = self.train, self.stage
        order = DataOrder(len(stage.dataset), train.batch_size, train.seed)
        batches = stream(
            stage.dataset,
            Batches(
                order,
                self.micro,
                self.accumulation,
                self.accelerator.process_index,
                self.accelerator.num_processes,
                start,
                train.max_steps,
            ),
            train.num_workers,
            pin=self.accelerator.device.type == "cuda",
        )
        self._listen()
        if start == 0:
            with explained("change the config"):  # the first pictures try sampler, grid and guidance together
                self.look(0)
        for step in range(start, train.max_steps):
            rate = optim.learning_rate(self.settings, step, train.max_steps)
            values = self.gradients(batches, step)
            norms = self.step(step, rate)
            self.journal.record(step + 1, {**values, **norms}, rate)
            done = step + 1
            if done % train.sample_every == 0 or done == train.max_steps:
                self.look(done)
            stopped = self._stopped()
            if self.accelerator.is_main_process and (done % train.ema_every == 0 or done == train.max_steps):
                self.powers.keep(self.run, done)
            if done % train.save_every == 0 or done == train.max_steps or stopped:
                self.save(done)
            if stopped:
                return stopped
        return 0

    def gradients(self, batches: Any, step: int) -> dict[str, Tensor]:
        """All backward passes of one step; the process wrappers average on the last."""
        sums: dict[str, Tensor] = {}
        for part in range(self.accumulation):
            with self.journal.waiting():
                batch: Batch = next(batches)
            with ExitStack() as stack:
                if part < self.accumulation - 1:
                    for network in self.stage.wrapped.values():
                        stack.enter_context(self.accelerator.no_sync(network))
                for name, value in self.stage.backward(batch, step, 1 / self.accumulation).items():
                    sums[name] = sums.get(name, 0) + value.detach().float() / self.accumulation
        self.stage.after_backward(step)
        return sums

    def step(self, step: int, rate: float) -> dict[str, Tensor]:
        """Clip and check gradients, step the optimisers, move the average. Returns the gradient norms."""
        scaler, norms = self.accelerator.scaler, {}
        moving = {name: learning(optimizer) for name, optimizer in self.optimizers.items()}
        for name, optimizer in self.optimizers.items():
            if scaler and moving[name]:
                scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(moving[name], self.settings.clip or math.inf)
            norms[f"grad_norm/{name}"] = norm.to(self.accelerator.device)
            optim.set_learning_rate(optimizer, rate)
        if scaler is None:  # a scaler meets its overflows by skipping the step
            refuse_non_finite(norms, step)
        for name, optimizer in self.optimizers.items():
            if scaler and moving[name]:
                scaler.step(optimizer)
            elif moving[name]:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if scaler:
            scaler.update()
        if self.train.ema:
            self.ema.update()
        self.powers.update(step + 1)
        return norms

    def look(self, step: int) -> None:
        """Pictures and validation with the averaged weights, in the main process; the others wait."""
        self.journal.flush(step)  # so that metrics.jsonl is in the order of steps, however often it is flushed
        if self.accelerator.is_main_process:
            folder = self.run / "samples" / f"step-{step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            with self.ema.applied(), torch.no_grad():
                self.journal.look(step, self.stage.evaluate(folder), folder)
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

    def _listen(self) -> None:
        """SIGTERM and SIGINT ask for a save at the next step boundary; a second SIGINT leaves at once."""

        def note(number: int, _frame: FrameType | None) -> None:
            if self.signal == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = number

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, note)

    def _stopped(self) -> int:
        """The signal any process was sent, known to all of them at the same step."""
        if self.accelerator.num_processes == 1:
            return self.signal
        flag = torch.tensor(self.signal, device=self.accelerator.device)
        return int(self.accelerator.gather(flag).max().item())


def learning(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that have a gradient: none of a discriminator's before it starts."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def refuse_non_finite(norms: dict[str, Tensor], step: int) -> None:
    """Raise UserError (exit 5) where a gradient is not finite, before it reaches the weights."""
    for name, norm in norms.items():
        if not torch.isfinite(norm):
            raise UserError(
                f"{name.replace('/', ' of the ')} is not finite at step {step}",
                hint="lower --lr, check the data with scripts/make_shards.py verify, or use --mixed-precision no",
                code=NUMERICAL,
            )
