"""Over-fitting as validation shows it: held-out scores rise from look to look while those of training samples fall."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from training.loop.stage import Stage
from training.messages import warn
from training.runs.checkpoint import score
from training.runs.checkpoints import Checkpoints

RISES = 3  # validations in a row at which the held-out score became worse
MARGIN = 0.1  # gap between held-out and training score, as a share of the held-out one


class Overfitting:
    """Watches the validations of a run and speaks once, over all its resumptions."""

    def __init__(self) -> None:
        self.recent: list[tuple[int, float, float]] = []  # step, held-out and training score, lower is better
        self.told = False

    def look(self, step: int, held_out: float, training: float) -> bool:
        """Note a validation; whether it is now, and for the first time, to be said that the run over-fits: the last
        `RISES` held-out scores rose, the training score fell meanwhile, and the gap is over `MARGIN` of the held-out
        score.
        """
        if not (math.isfinite(held_out) and math.isfinite(training)):  # nothing rises from or to it; no JSON keeps it
            self.recent = []
            return False
        self.recent = [*self.recent, (step, held_out, training)][-RISES - 1 :]
        _, held, seen = zip(*self.recent, strict=True)
        rises = len(held) > RISES and all(a < b for a, b in pairwise(held))
        found = rises and seen[-1] < seen[0] and held_out - training > MARGIN * abs(held_out)
        first, self.told = found and not self.told, self.told or found
        return first

    def watch(self, step: int, numbers: Mapping[str, float], stage: Stage, checkpoints: Checkpoints) -> None:
        """Warn, the first time that the numbers of a validation show it."""
        name, sign = stage.score
        training = numbers.get(f"{name}_train")
        if training is not None and self.look(step, sign * numbers[name], sign * training):
            warn(self.sentence(name, sign, checkpoints, stage.audit))

    def sentence(self, name: str, sign: float, checkpoints: Checkpoints, audit: str) -> str:
        """What is said, of the score `name`, and what to do: `audit` is what the kind of training adds to it."""
        (first, was, _), (last, held_out, training) = self.recent[0], self.recent[-1]
        numbers = f"{sign * was:.4g} at step {first}, {sign * held_out:.4g} at step {last}"
        scores = {path: value for path in checkpoints.folder.glob("step-*") if (value := score(path)) is not None}
        best = min(scores, key=lambda path: scores[path], default=None)
        return (
            f"over-fitting: held-out {name} became worse at {RISES} validations in a row ({numbers}), that of training "
            f"pictures better ({sign * training:.4g}): stop here and {_use(best)}; or train on more pictures{audit}"
        )

    def state(self) -> dict[str, Any]:
        """Plain state for checkpoints."""
        return {"recent": [list(row) for row in self.recent], "told": self.told}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`; earlier versions' checkpoints hold none."""
        self.recent = [(int(step), held_out, training) for step, held_out, training in state.get("recent", [])]
        self.told = bool(state.get("told", False))


def _use(best: Path | None) -> str:
    """What to take instead of the last weights."""
    if best is None:
        return "train for fewer steps (no checkpoint has a score: save at steps of a validation)"
    return f"use the best checkpoint, --model {shlex.quote(str(best))}"
