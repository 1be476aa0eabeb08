"""Validation with averaged weights in float32: pictures and numbers, in the main process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from training.data.images import Images
from training.data.latents import Latents
from training.data.samples import Batch
from training.guarding import disk_error
from training.loop.ema import EMA
from training.loop.stage import Stage
from training.loop.wrapping import unwrapped
from training.machine.faults import fault

CHUNK = 64


def validate(stage: Stage, ema: EMA, folder: Path) -> tuple[dict[str, float], float]:
    """Pictures in `folder`, the stage's numbers, and its score, lower is better. Raises UserError for a full disk.

    Where the stage can, the score's number is also taken on training samples, as `NAME_train`, and how much better it
    is there, as `NAME_gap`: that doubles what numbers cost, not pictures.
    """
    name, sign = stage.score
    try:
        fault("samples")
        folder.mkdir(parents=True, exist_ok=True)
        with ema.averaged_weights(), unwrapped(stage), torch.no_grad():
            numbers = stage.evaluate(folder)
            seen = stage.training_score() if stage.training_score else None
    except OSError as failure:
        raise disk_error(folder, failure) from None
    if seen is not None:
        numbers |= {f"{name}_train": seen, f"{name}_gap": sign * (numbers[name] - seen)}
    return numbers, sign * numbers[name]


def as_many(training: Images | Latents, held_out: Sequence[int]) -> Iterator[Batch] | None:
    """As many training samples as are `held_out`, evenly over them, each time the same, as held-out ones are read: none
    mirrored. None where there are none, or where they lie elsewhere, from where they would be fetched out of turn."""
    if training.shards.remote or not len(training):
        return None
    return training.plain.chunks(training.plain.evenly(len(held_out)), CHUNK, "validating on training samples")
