"""The one training loop: all that learns runs through these lines.

A step: micro-batches backward -> gradients averaged over processes -> clipped -> judged -> what the stage measured ->
optimisers -> averages -> what follows the weights in the stage.
Around it: journal, validation (and the way back from a wreck), checkpoints, signals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from training.errors import UserError, as_user_error
from training.loop import optim
from training.loop.books import Books
from training.loop.ema import EMA
from training.loop.optim import learning
from training.loop.pace import Pace
from training.loop.passes import Passes
from training.loop.power_ema import PowerAverages, drop_after
from training.loop.rollback import Rollback
from training.loop.sharding import together
from training.loop.stage import Stage
from training.loop.state import TrainingState
from training.loop.validation import validate
from training.loop.watchdogs import Watchdogs, explain
from training.loop.wrapping import wrap
from training.machine.processes import announce, meet
from training.machine.signals import Signals
from training.messages import note, warn
from training.runs.checkpoint import OTHER_SCORES, SCORED_BY, Checkpoint
from training.runs.checkpoints import Checkpoints
from training.runs.journal import Journal
from training.runs.writer import Writer
from training.settings.sections import Optimizer, Train

if TYPE_CHECKING:
    from accelerate import Accelerator

AGREED_EVERY = 8  # steps after which several GPUs tell each other what signals they were sent
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
        watchers: Sequence[Callable[[Path], None]] = (),
    ) -> None:
        """`rate` of a 0-based step stands in for the schedule of `optimizer`, where one is given; `watchers` are called
        with the run folder in the main process, once a validation is written there."""
        self.stage, self.train, self.settings, self.accelerator, self.run = stage, train, optimizer, accelerator, run
        self.watchers, self.rate = watchers, rate or partial(optim.learning_rate, optimizer, max_steps=train.max_steps)
        wrap(stage, accelerator, compiles=train.compile, shards=train.sharding == "full")
        self.ema = EMA(stage.averaged, train.ema, stage.networks)  # after the move to the device, where averages belong
        self.powers = PowerAverages(stage.averaged, train.ema_lengths)
        self.optimizers = {
            name: optim.build(optimizer, [stage.networks[n] for n in networks], scale=scale)
            for name, (networks, scale) in stage.optimizers.items()
        }
        self.checkpoints = Checkpoints(run, train.keep_last, keep_best=train.keep_best)
        self.writer = Writer(self.checkpoints)
        self.journal, self.watchdogs = Journal(run, train, accelerator), Watchdogs(run, train, accelerator)
        books = Books(stage, self.watchdogs)
        self.state = TrainingState(
            stage, self.ema, self.powers, self.optimizers, accelerator.scaler, self.journal, self.watchdogs, books
        )
        # On a CPU there is nothing to wait for; only the fused kernel can be held back on the device.
        fused = all(optimizer.defaults["fused"] for optimizer in self.optimizers.values())
        self.waits = self.watchdogs.skips or not fused or accelerator.device.type == "cpu"
        self.signals, self.done, self.saving = Signals(), 0, False
        asked = (self.watchdogs.skips, self.signals.give_up)
        self.passes = Passes(stage, train, accelerator, self.journal, micro, accumulation, *asked)
        self.scored: tuple[int, float] | None = None  # step and score of the last validation

    def fit(self, start: int) -> int:
        """Train from step `start` to the end. Returns the signal number that stopped it, or 0.

        Raises UserError where a loss or gradient is not finite (exit 5), which moves no weight, where memory runs out
        (6) and where another process is gone (1).
        """
        self.done = start
        if self.accelerator.is_main_process and (later := drop_after(self.run, start)):
            given_up = f"averages of what this run had been after step {start}, which it gives up"
            note(f"removed {', '.join(later)}: {given_up}")
        self.passes.open_data(start)
        self.signals.listen()
        try:
            return self._steps(start)
        except Exception as failure:
            with suppress(Exception):  # what is being written is sound; the first failure is the one to tell
                self.writer.finish()
            micro, batch = self.passes.micro, self.train.batch_size
            explanation = explain(failure, self.done, micro, batch, auto=self.passes.searches)
            if explanation is failure:
                raise
            raise explanation from failure

    def _steps(self, start: int) -> int:
        train = self.train
        if start == 0:
            with as_user_error("change the config"):  # the first pictures try sampler, grid and guidance together
                self.validate(0)
        pace = Pace(self.accelerator, start, train.max_steps)
        for step in range(start, train.max_steps):
            pace.begin()
            self.writer.check()  # a save that failed ends the run here, not at its end
            rate = self.rate(step)
            values = self.gradients(step) | self.step(step, rate)
            step_count = self.done = step + 1
            pace.end(step_count)
            final = step_count == train.max_steps
            if final or any(step_count % every == 0 for every in (train.log_every, train.ema_every, COMPARED_EVERY)):
                self.settle()
            self.journal.record(step_count, values, rate)
            # Validated before the save: a checkpoint carries the score of its step, and a rollback changes weights.
            if step_count % train.sample_every == 0 or final:
                self.validate(step_count)
            stop_signal = self._poll_signals()  # after validation, which may take long: what came meanwhile counts
            if step_count % train.ema_every == 0 or final:
                self.powers.keep(self.run, step_count, main=self.accelerator.is_main_process)
            saving = step_count % train.save_every == 0 or final or bool(stop_signal) or self.saving
            # Compared before each save: weights on which processes do not agree never become a checkpoint.
            if saving or step == start or step_count % COMPARED_EVERY == 0:
                self.settle()
                self.watchdogs.compare(step_count, self.state.replicated())
            if saving:
                self.save(step_count, wait=not train.save_async or final or bool(stop_signal) or self.saving)
            if stop_signal:
                return stop_signal
        return 0

    def gradients(self, step: int) -> dict[str, Tensor]:
        """Leave the gradients of one step, averaged over processes; returns the mean losses."""
        return self.passes.take(step)

    def step(self, step: int, rate: float) -> dict[str, Tensor]:
        """Clip and check gradients, step the optimisers, move the averages. Returns what is to be logged of it.

        A step that is skipped leaves all as it was, but for the loss scale, the watchdogs and the place in the data.
        """
        scaler = self.accelerator.scaler
        moving = [optimizer for optimizer in self.optimizers.values() if learning(optimizer)]
        norms = self.clip(rate)
        seen = step, self.passes.losses, norms, self.passes.keys(step)
        sound, guard = True, None
        if self.waits:
            with self.stopping():
                sound = self.watchdogs.judge(*seen)
        else:
            guard = self.watchdogs.defer(*seen)
        if sound:
            self.stage.after_backward(step)
            for optimizer in moving:
                if guard is not None:  # the fused kernel reads it on the device, and moves nothing where it is 1
                    optimizer.found_inf = guard  # type: ignore[attr-defined]
                scaler.step(optimizer) if scaler else optimizer.step()
            if self.ema.due():  # not in the turn of a network beside: the decay is that of a step of its own
                self.ema.update()  # with decay 0 a copy: what checkpoints call averaged is always what was trained
            self.powers.update(step + 1)
        else:
            self.passes.undo()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)  # of a skipped step, too: its gradients must not enter the next
        if scaler:
            scaler.update()  # once, after all optimisers: they share one scale
        self.stage.after_step(step, taken=sound)
        return norms if sound else {**norms, "skipped": torch.ones((), device=self.accelerator.device)}

    def clip(self, rate: float) -> dict[str, Tensor]:
        """Ready gradients and optimisers for a step of `rate`; the norms of the gradients before the clip."""
        norms = {}
        for name, optimizer in self.optimizers.items():
            if moving := learning(optimizer):  # a network whose turn it is not has no norm
                if self.accelerator.scaler:
                    self.accelerator.scaler.unscale_(optimizer)  # first, for limit and norms are of true gradients
                norm = nn.utils.clip_grad_norm_(moving, self.settings.clip or math.inf)
                norms[f"grad_norm/{name}"] = together(norm).to(self.accelerator.device)
            optim.set_learning_rate(optimizer, rate)
        return norms

    def settle(self) -> None:
        """Read what the watchdogs have not yet told. Before anything is written, compared or looked at. Collective."""
        with self.stopping():
            self.watchdogs.settle()

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Inside, a verdict may end the run: what led to it is in the log then, and nothing of what came after."""
        try:
            yield
        except UserError:
            assert self.watchdogs.stopped_at is not None
            self.done = self.watchdogs.stopped_at
            self.journal.cut(self.done)
            self.journal.flush(self.done)  # every process is here
            raise

    def validate(self, step: int) -> None:
        """Pictures and validation in the main process, and the way back where they tell of a wreck. Collective.

        Raises UserError (exit 5) in all processes where a return is due and none is left.
        """
        self.settle()
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
            self.state.overfitting.watch(step, numbers, self.stage, self.checkpoints)
            for watcher in self.watchers:
                watcher(self.run)
        else:
            self.ema.lend()
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
        announce(self.accelerator, f"{verdict}: back to its weights; {rollback.prospect(step)}", warn)

    def save(self, step: int, *, wait: bool) -> None:
        """Write a checkpoint, or begin to, unless to `wait`: in the main process, or in all, each its own parts."""
        self.settle()
        self.journal.flush(step)
        self.state.books.gather()
        if self.state.shared:
            self.checkpoints.save_parts(self.snapshot(step), main=self.accelerator.is_main_process)
        elif self.accelerator.is_main_process:
            self.writer.save(self.snapshot(step), wait=wait)
        meet()

    def snapshot(self, step: int) -> Checkpoint:
        """Everything the run needs to go on from `step`."""
        place = {
            **self.passes.place(step),
            "score": self.scored[1] if self.scored and self.scored[0] == step else None,
            "scored_by": SCORED_BY,
        }
        return self.state.snapshot(step, place)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take back a snapshot, in every process. Raises UserError where the weights do not fit."""
        self.state.restore(checkpoint, self.checkpoints.folder / f"step-{checkpoint.step:08d}")
        self.passes.restore(checkpoint.step, checkpoint.state)
        if checkpoint.state.get("scored_by", 1) != SCORED_BY:
            announce(self.accelerator, OTHER_SCORES)

    def _poll_signals(self) -> int:
        """The signal any process was sent, known to all of them at the same step; also whether to save (`saving`).

        Several GPUs agree every few steps, for which each waits; elsewhere that costs nothing.
        """
        several = self.accelerator.num_processes > 1
        due = self.done % AGREED_EVERY == 0 or self.done == self.train.max_steps
        if several and not due and self.accelerator.device.type != "cpu":
            self.saving = False
            return 0
        wishes = [self.signals.stop, int(self.signals.take_save())]
        if several:
            everyone = self.accelerator.gather(torch.tensor([wishes], device=self.accelerator.device))
            wishes = everyone.max(dim=0).values.tolist()
        self.saving = bool(wishes[1])
        return wishes[0]
