"""Rollback: a run returns to its best checkpoint where the adversarial gradient has made it much worse.

A held-out score s (lower is better) measured after steps with that gradient tells of a wreck where s > s_best + margin,
s_best being the best of the checkpoints. The loop then takes back the best weights and goes on at the step where it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import NUMERICAL, UserError
from training.runs.checkpoint import Checkpoint, score
from training.runs.checkpoints import Checkpoints


@dataclass
class Rollback:
    """When to go back, to which checkpoint, and what differs then; `share(step)` of the gradient reaches the decoder.

    Weights, averages, optimisers and the stage's state come back; the place in the data does not. The discriminator
    learns at once, its gradient is held back for `pause` steps, then rises anew to 2^-count of its weight, so that each
    attempt is gentler. Counter and new start are kept in the stage's state.
    """

    margin: float
    pause: int
    limit: int
    share: Callable[[int], float]
    count: int = 0

    @property
    def weight(self) -> float:
        """What multiplies the adversarial gradient by now."""
        return 0.5**self.count

    @property
    def may_return(self) -> bool:
        """Whether the run may go back once more."""
        return self.count < self.limit

    def target(self, checkpoints: Checkpoints, step: int, score_now: float) -> Path | None:
        """The best checkpoint before `step`, where `score_now` is too far above its score."""
        earlier = (path for path in checkpoints.folder.glob("step-*") if path.name < f"step-{step:08d}")
        scores = {path: value for path in earlier if (value := score(path)) is not None}
        best = min(scores, key=lambda path: scores[path], default=None)
        if best is None or score_now <= scores[best] + self.margin:  # a score that is NaN is no good one
            return None
        return best

    def verdict(self, score: str, step: int, checkpoint: Path) -> str:
        """What is said of a wreck. Raises UserError (exit 5) where no return is left."""
        reason = f"held-out {score} at step {step} is more than {self.margin:g} below that of {checkpoint.name}"
        if not self.may_return:
            raise UserError(
                f"{reason}, and all {self.limit} allowed returns are used",
                hint="lower loss.adversarial or discriminator_lr, or lengthen loss.adversarial_ramp; "
                f"the best checkpoint is {checkpoint}",
                code=NUMERICAL,
            )
        return reason

    def prospect(self, step: int) -> str:
        """How a run that went back at `step` goes on."""
        return f"the adversarial gradient begins again at step {step + self.pause}, at {self.weight:g} of its weight"

    def merge_checkpoint(self, best: Checkpoint, present: Mapping[str, Any], step: int) -> Checkpoint:
        """The good checkpoint as of `step`: its weights and averages with the present place in the data."""
        returns = {"returns": {"count": self.count + 1, "start": step + self.pause}}
        carried = {key: best.state[key] for key in ("ema_updates", "scaler")}
        state = {**present, **carried, "stage": {**best.state["stage"], **returns}}
        return dataclasses.replace(best, step=step, state=state)
