"""Validation with averaged weights: pictures and numbers, in the main process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from training.files import disk_error
from training.machine.faults import fault

if TYPE_CHECKING:
    from training.loop.loop import Loop


def look(loop: Loop, step: int) -> None:
    """Pictures and validation with the averaged weights, in the main process; the others wait, and return with it.

    Raises UserError (exit 5) in all processes where a return is due and none is left.
    """
    loop.journal.flush(step)  # so that metrics.jsonl is in the order of steps, however often it is flushed
    returns, good = loop.stage.returns, None
    if loop.accelerator.is_main_process:
        folder = loop.run / "samples" / f"step-{step:08d}"
        try:
            fault("samples")
            folder.mkdir(parents=True, exist_ok=True)
            with loop.ema.applied(), torch.no_grad():
                numbers = loop.stage.evaluate(folder)
        except OSError as failure:
            raise disk_error(folder, failure) from None
        name, sign = loop.stage.score
        loop.scored = step, sign * numbers[name]
        if returns and (good := returns.wanted(loop, step)) and returns.left:
            numbers = {**numbers, "returned_to": float(good.name.rpartition("-")[2])}
        loop.journal.look(step, numbers, folder)
    if returns:
        returns.follow(loop, step, good)
    loop.accelerator.wait_for_everyone()
