"""Checkpoints written by a thread while training goes on, from a copy made at once."""

from __future__ import annotations

import copy
from concurrent.futures import Future
from threading import Thread

from training.runs.checkpoint import Checkpoint
from training.runs.checkpoints import Checkpoints


class Writer:
    """Writes checkpoints, beside the training where asked: at most one is under way, and the next waits for it."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.pending: Future[None] | None = None

    def save(self, checkpoint: Checkpoint, *, wait: bool) -> None:
        """Write a checkpoint: before this returns (`wait`), or from a copy on the CPU while its tensors change.

        Raises what `Checkpoints.save` raises, for the save still under way, too.
        """
        self.finish()
        if wait:
            self.checkpoints.save(checkpoint)
            return
        self.pending = Future()
        # A daemon: a second Ctrl-C leaves at once, and what is staged is swept by the next run.
        work = copy_checkpoint(checkpoint), self.pending
        Thread(target=self._write, args=work, daemon=True, name="checkpoint").start()

    def check(self) -> None:
        """Raise what ended the save under way, where it has failed by now."""
        if self.pending and self.pending.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way. Raises what ended it."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def _write(self, checkpoint: Checkpoint, pending: Future[None]) -> None:
        try:
            self.checkpoints.save(checkpoint)
            pending.set_result(None)
        except BaseException as failure:  # whatever it is, the training's own thread is the one to raise it
            pending.set_exception(failure)


def copy_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint in memory that nothing else writes to, on the CPU."""
    tensors = {
        file: {name: value.detach().to("cpu", copy=True) for name, value in part.items()}
        for file, part in checkpoint.tensors.items()
    }
    return Checkpoint(checkpoint.step, tensors, copy.deepcopy(checkpoint.state))
