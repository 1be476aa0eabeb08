"""Validation with averaged weights in float32: pictures and numbers, in the main process."""

from __future__ import annotations

from pathlib import Path

import torch

from training.guarding import disk_error
from training.loop.ema import EMA
from training.loop.stage import Stage
from training.loop.wrapping import unwrapped
from training.machine.faults import fault


def validate(stage: Stage, ema: EMA, folder: Path) -> tuple[dict[str, float], float]:
    """Pictures in `folder`, the stage's numbers, and its score, lower is better. Raises UserError for a full disk."""
    try:
        fault("samples")
        folder.mkdir(parents=True, exist_ok=True)
        with ema.averaged_weights(), unwrapped(stage), torch.no_grad():
            numbers = stage.evaluate(folder)
    except OSError as failure:
        raise disk_error(folder, failure) from None
    name, sign = stage.score
    return numbers, sign * numbers[name]
