"""A training in one go through the one loop: no averages, one look and one save at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from training.loop.loop import Loop
from training.loop.stage import Stage
from training.settings.sections import Optimizer, Train

if TYPE_CHECKING:
    from accelerate import Accelerator


def short_run(
    stage: Stage,
    optimizer: Optimizer,
    accelerator: Accelerator,
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    rate: Callable[[int], float] | None = None,
) -> float:
    """Train `stage` in `folder`, from the start; returns its score at the end, lower is better.

    Ends the program, with the exit code that a shell gives it, where a signal asked for it.
    """
    budget = Train(max_steps=steps, batch_size=batch_size, seed=seed, ema=0.0)
    train = replace(budget, save_every=steps, sample_every=steps, log_every=100, keep_best=False)
    loop = Loop(stage, train, optimizer, accelerator, folder, 1, batch_size, rate)
    loop.journal.restart()
    if number := loop.fit(0):
        raise SystemExit(128 + number)
    assert loop.scored is not None  # the last step looks
    return loop.scored[1]
