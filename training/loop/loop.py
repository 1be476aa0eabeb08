"""The one training loop: all that learns runs through these lines.

A step: micro-batches backward -> gradients averaged over processes -> clipped -> judged -> optimisers -> averages.
Around it: journal, validation (and the way back from a wreck), checkpoints, signals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from training.data.loader import stream
from training.data.order import Batches, DataOrder
from training.errors import UserError, as_user_error
from training.loop import optim
from training.loop.ema import EMA
from training.loop.optim import learning
from training.loop.power_ema import PowerAverages
from training.loop.rollback import Rollback
from training.loop.stage import Stage
from training.loop.state import TrainingState
from training.loop.validation import validate
from training.loop.watchdogs import Attempt, Watchdogs, explain
from training.loop.wrapping import wrap
from training.machine.faults import fault
from training.machine.memory import out_of_memory
from training.machine.processes import announce, meet
from training.machine.signals import Signals
from training.runs.checkpoints import Checkpoint, Checkpoints
from training.runs.journal import Journal
from training.runs.writer import Writer
from training.settings.sections import Optimizer, Train

if TYPE_CHECKING:
    from accelerate import Accelerator

COMPARED_EVERY = 100  # steps after which processes compare their weights, besides the first step and each save


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
        rate: Callable[[int], float] | None = None,
    ) -> None:
        """`rate` of a 0-based step stands in for the schedule of `optimizer`, where one is given."""
        self.stage, self.train, self.settings, self.accelerator, self.run = stage, train, optimizer, accelerator, run
        self.accumulation, self.micro, self.shrinks = accumulation, micro, train.micro_batch_size == "auto"
        self.rate = rate or partial(optim.learning_rate, optimizer, max_steps=train.max_steps)
        wrap(stage, accelerator, compiles=train.compile)
        self.ema = EMA(stage.averaged, train.ema)  # after the move to the device, where averages belong too
        self.powers = PowerAverages(stage.averaged, train.ema_lengths)
        self.optimizers = {
            name: optim.adamw(optimizer, [stage.networks[n] for n in networks], scale=scale)
            for name, (networks, scale) in stage.optimizers.items()
        }
        self.checkpoints = Checkpoints(run, train.keep_last, keep_best=train.keep_best)
        self.writer = Writer(self.checkpoints)
        self.journal, self.watchdogs = Journal(run, train, accelerator), Watchdogs(run, train, accelerator)
        averages, notes = (self.ema, self.powers), (self.journal, self.watchdogs)
        self.state = TrainingState(stage, *averages, self.optimizers, accelerator.scaler, *notes)
        self.signals, self.base = Signals(), (0, 0)  # of the data order
        self.open_data(0)
        self.done, self.saving = 0, False
        self.scored: tuple[int, float] | None = None  # step and score of the last validation
        self.losses: list[Tensor] = []  # of this step's micro-batches, each the sum of all it told

    def plan_batches(self, start: int) -> Batches:
        """This process's micro-batches from step `start` on."""
        dataset, train = self.stage.dataset, self.train
        order = DataOrder(len(dataset), train.batch_size, train.seed, self.base, *dataset.shards.windows)
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        return Batches(order, self.micro, self.accumulation, process, processes, start, train.max_steps)

    def fit(self, start: int) -> int:
        """Train from step `start` to the end. Returns the signal number that stopped it, or 0.

        Raises UserError before the optimiser step where a loss or gradient is not finite (exit 5), where memory runs
        out (6) and where another process is gone (1).
        """
        self.done = start
        self.open_data(start)
        self.signals.listen()
        try:
            return self._steps(start)
        except Exception as failure:
            with suppress(Exception):  # what is being written is sound; the first failure is the one to tell
                self.writer.finish()
            explanation = explain(failure, self.done, self.micro, self.train.batch_size)
            if explanation is failure:
                raise
            raise explanation from failure

    def open_data(self, start: int) -> None:
        """Have the micro-batches from step `start` on read."""
        self.batches, pin = self.plan_batches(start), self.accelerator.device.type == "cuda"
        workers, give_up = self.train.num_workers, self.signals.give_up
        self.incoming = stream(self.stage.dataset, self.batches, workers, pin=pin, give_up=give_up)

    def _steps(self, start: int) -> int:
        train = self.train
        if start == 0:
            with as_user_error("change the config"):  # the first pictures try sampler, grid and guidance together
                self.validate(0)
        for step in range(start, train.max_steps):
            self.writer.check()  # a save that failed ends the run here, not at its end
            rate = self.rate(step)
            self.journal.record(step + 1, self.gradients(step) | self.step(step, rate), rate)
            step_count = self.done = step + 1
            final = step_count == train.max_steps
            # Validated before the save: a checkpoint carries the score of its step, and a rollback changes weights.
            if step_count % train.sample_every == 0 or final:
                self.validate(step_count)
            stop_signal = self._poll_signals()  # after validation, which may take long: what came meanwhile counts
            if self.accelerator.is_main_process and (step_count % train.ema_every == 0 or final):
                self.powers.keep(self.run, step_count)
            saving = step_count % train.save_every == 0 or final or bool(stop_signal) or self.saving
            # Compared before each save: weights on which processes do not agree never become a checkpoint.
            if saving or step == start or step_count % COMPARED_EVERY == 0:
                self.watchdogs.compare(step_count, self.state.replicated())
            if saving:
                self.save(step_count, wait=not train.save_async or final or bool(stop_signal) or self.saving)
            if stop_signal:
                return stop_signal
        return 0

    def gradients(self, step: int) -> dict[str, Tensor]:
        """The gradients of one step, averaged over processes; returns the mean losses.

        With the micro-batch "auto", where memory runs out in any process, all drop what they have of the step and take
        it again in smaller parts. They then agree before they exchange gradients, or one would wait for another's.
        """
        fault("step")
        while self.shrinks:
            attempt, reason = Attempt(self.stage), ""
            try:
                values = self.backward_passes(step)
            except RuntimeError as failure:
                if not out_of_memory(failure):
                    raise
                reason = str(failure) or "out of memory"  # the exception itself would hold the activations
            # Every process comes here, whether it failed or not: the others would wait for one that did not.
            failures = self.accelerator.reduce(torch.tensor(float(bool(reason)), device=self.accelerator.device), "sum")
            if not failures:
                self.average()  # here, for no pass of an attempt has averaged: it might have been undone
                break
            attempt.drop()
            self._shrink(step, reason or "out of memory in another process")
        else:
            values = self.backward_passes(step)
        self.stage.after_backward(step)
        return values

    def average(self) -> None:
        """Average gradients over processes, where the process wrappers have not."""
        if self.accelerator.num_processes > 1:
            for p in (p for optimizer in self.optimizers.values() for p in learning(optimizer)):
                p.grad = self.accelerator.reduce(p.grad, "mean")

    def backward_passes(self, step: int) -> dict[str, Tensor]:
        """All backward passes of one step; the process wrappers average on the last, but where micro-batches shrink."""
        sums: dict[str, Tensor] = {}
        self.losses.clear()
        for part in range(self.accumulation):
            with self.journal.waiting():
                batch = next(self.incoming)
            with ExitStack() as stack:
                if self.shrinks or part < self.accumulation - 1:
                    for network in self.stage.wrapped.values():
                        stack.enter_context(self.accelerator.no_sync(network))
                values = self.stage.backward(batch, step, 1 / self.accumulation)
            self.losses.append(torch.stack([value.detach().float() for value in values.values()]).sum())
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / self.accumulation
        return sums

    def _shrink(self, step: int, reason: str) -> None:
        """Halve the micro-batch (to a number that divides it) at equal global batch, and read again from `step`."""
        smaller = next((n for n in range(self.micro // 2, 0, -1) if self.micro % n == 0), 0)
        if not smaller:
            raise torch.OutOfMemoryError(reason)
        now = f"going on with {smaller} (the global batch stays {self.train.batch_size})"
        announce(self.accelerator, f"note: out of memory at step {step} with a micro-batch of {self.micro}; {now}")
        self.accumulation, self.micro = self.accumulation * self.micro // smaller, smaller
        self.open_data(step)
        torch.cuda.empty_cache()

    def step(self, step: int, rate: float) -> dict[str, Tensor]:
        """Clip and check gradients, step the optimisers, move the average. Returns what is to be logged of it."""
        scaler, norms = self.accelerator.scaler, {}
        moving = {name: learning(optimizer) for name, optimizer in self.optimizers.items()}
        for name, optimizer in self.optimizers.items():
            if scaler and moving[name]:
                scaler.unscale_(optimizer)  # before the clip, whose limit and norms are those of true gradients
            norm = nn.utils.clip_grad_norm_(moving[name], self.settings.clip or math.inf)
            norms[f"grad_norm/{name}"] = norm.to(self.accelerator.device)
            optim.set_learning_rate(optimizer, rate)
        try:
            sound = self.watchdogs.judge(step, self.losses, norms, self.sample_keys)
        except UserError:
            self.journal.flush(step)  # what led to it; every process is here
            raise
        for name, optimizer in self.optimizers.items():
            if moving[name] and sound:
                scaler.step(optimizer) if scaler else optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # of a skipped step, too: its gradients must not enter the next
        if scaler:
            scaler.update()  # once, after all optimisers: they share one scale
        self.ema.update()  # with decay 0 a copy: what checkpoints call averaged is always what was trained
        self.powers.update(step + 1)
        return norms if sound else {**norms, "skipped": torch.ones((), device=self.accelerator.device)}

    def sample_keys(self, process: int, part: int) -> list[str]:
        """The samples of one micro-batch of the step being taken, by key."""
        return [self.stage.dataset.shards.key(s.index) for s in self.batches.share(self.done, part, process)]

    def validate(self, step: int) -> None:
        """Pictures and validation in the main process, and the way back where they tell of a wreck. Collective.

        Raises UserError (exit 5) in all processes where a return is due and none is left.
        """
        self.journal.flush(step)  # so that metrics.jsonl is in the order of steps, however often it is flushed
        rollback, target = self.stage.rollback, None
        if self.accelerator.is_main_process:
            folder = self.run / "samples" / f"step-{step:08d}"
            numbers, score = validate(self.stage, self.ema, folder)
            self.scored = step, score
            if rollback and rollback.share(step - 1):
                self.writer.finish()  # the best may be on its way to the disk
                target = rollback.target(self.checkpoints, step, score)
                if target and rollback.may_return:
                    numbers = {**numbers, "returned_to": float(target.name.rpartition("-")[2])}
            self.journal.look(step, numbers, folder)
        meet()  # pictures may take longer than any limit of the process group
        if rollback:
            self._roll_back(rollback, step, target)

    def _roll_back(self, rollback: Rollback, step: int, best: Path | None) -> None:
        """Go back to the checkpoint that the main process names, if any. Collective."""
        from accelerate.utils import broadcast_object_list

        target: Path | None = broadcast_object_list([best])[0]
        if target is None:
            return
        verdict = rollback.verdict(self.stage.score[0], step, target)
        checkpoint = rollback.merge_checkpoint(self.checkpoints.load(target), self.snapshot(step).state, step)
        for optimizer in self.optimizers.values():
            optimizer.state.clear()  # what has learned only since then has no moments to take back
        self.restore(checkpoint)
        self.scored = None  # the number is not that of the weights that now stand
        announce(self.accelerator, f"warning: {verdict}: back to its weights; {rollback.prospect(step)}")

    def save(self, step: int, *, wait: bool) -> None:
        """Write a checkpoint (main process), or begin to, unless to `wait` for it; the others wait as long."""
        self.journal.flush(step)
        if self.accelerator.is_main_process:
            self.writer.save(self.snapshot(step), wait=wait)
        meet()

    def snapshot(self, step: int) -> Checkpoint:
        """Everything the run needs to go on from `step`."""
        place = {
            "place": self.batches.order.place(step),
            "score": self.scored[1] if self.scored and self.scored[0] == step else None,
            **({"micro": self.micro} if self.shrinks else {}),
        }
        return self.state.snapshot(step, place)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take back a snapshot, in every process. Raises UserError where the weights do not fit."""
        self.state.restore(checkpoint, self.checkpoints.folder / f"step-{checkpoint.step:08d}")
        state, samples = checkpoint.state, self.micro * self.accumulation
        if "watchdogs" in state:  # not in checkpoints of earlier versions, which did not keep their place either
            self.base = checkpoint.step, int(state["place"])
        if self.shrinks and "micro" in state and samples % int(state["micro"]) == 0:  # what was found to fit
            self.micro, self.accumulation = int(state["micro"]), samples // int(state["micro"])

    def _poll_signals(self) -> int:
        """The signal any process was sent, known to all of them at the same step; also whether to save (`saving`)."""
        wishes = [self.signals.stop, int(self.signals.take_save())]
        if self.accelerator.num_processes > 1:
            everyone = self.accelerator.gather(torch.tensor([wishes], device=self.accelerator.device))
            wishes = everyone.max(dim=0).values.tolist()
        self.saving = bool(wishes[1])
        return wishes[0]
