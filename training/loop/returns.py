"""A look at where a training stands: validation, pictures, and the way back where the numbers tell of a wreck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import NUMERICAL, UserError
from training.machine.processes import announce
from training.runs.checkpoints import score

if TYPE_CHECKING:
    from training.loop.loop import Loop


@dataclass
class Returns:
    """The way back where the adversarial gradient, of which `share(step)` reaches the decoder, wrecks what was good.

    A held-out score worse by more than `margin` than the best checkpoint's, after steps with that gradient, brings the
    best back: weights, averages, optimisers and the stage's state. The run goes on at the step where it is, with its
    place in the data; the discriminator learns at once, its gradient is held back for `pause` steps, then rises anew to
    2^-count of its weight, so that each attempt is gentler. Counter and new start are kept in the stage's state.
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
    def left(self) -> bool:
        """Whether the run may return once more."""
        return self.count < self.limit

    def wanted(self, loop: Loop, step: int) -> Path | None:
        """The best checkpoint, where the score just measured is too far below its own. For the main process."""
        if loop.scored is None or not self.share(step - 1):
            return None
        loop.writer.finish()  # the best may be on its way to the disk
        earlier = (p for p in loop.checkpoints.folder.glob("step-*") if p.name < f"step-{step:08d}")
        scores = {path: value for path in earlier if (value := score(path)) is not None}
        best = min(scores, key=lambda path: scores[path], default=None)
        if best is None or loop.scored[1] <= scores[best] + self.margin:  # a score that is NaN is no good one
            return None
        return best

    def follow(self, loop: Loop, step: int, good: Path | None) -> None:
        """Go back to the checkpoint that the main process names, if any. Collective."""
        from accelerate.utils import broadcast_object_list

        found: Path | None = broadcast_object_list([good])[0]
        if found is None:
            return
        worse = f"held-out {loop.stage.score[0]} at step {step} is more than {self.margin:g} below that of {found.name}"
        if not self.left:
            raise UserError(
                f"{worse}, and no return is left of {self.limit}",
                hint="lower loss.adversarial or discriminator_lr, or lengthen loss.adversarial_ramp; "
                f"what was good is kept in {found}",
                code=NUMERICAL,
            )
        checkpoint, present = loop.checkpoints.load(found), loop.snapshot(step).state
        back = {"returns": {"count": self.count + 1, "start": step + self.pause}}
        kept = {key: checkpoint.state[key] for key in ("ema_updates", "scaler")}
        state: dict[str, Any] = {**present, **kept, "stage": {**checkpoint.state["stage"], **back}}
        for optimizer in loop.optimizers.values():
            optimizer.state.clear()  # what has learned only since then has no moments to take back
        loop.restore(replace(checkpoint, step=step, state=state))
        loop.scored = None  # the number is not that of the weights that now stand
        again = f"the adversarial gradient begins again at step {step + self.pause}, at {self.weight:g} of its weight"
        announce(loop.accelerator, f"warning: {worse}: back to its weights; {again}")


