"""How fast a run goes, told once its first steps are known, and when it will end."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

import torch

from training.machine.processes import announce
from training.messages import per_second, roughly

if TYPE_CHECKING:
    from accelerate import Accelerator

MEASURED = 10  # steps, the first of which warms up and does not count


class Pace:
    """Times the first steps from `start` on, a GPU waited for in each; later ones cost nothing."""

    def __init__(self, accelerator: Accelerator, start: int, max_steps: int) -> None:
        self.accelerator, self.start, self.max_steps = accelerator, start, max_steps
        self.began, self.seconds = 0.0, list[float]()

    def begin(self) -> None:
        """A step begins."""
        if len(self.seconds) < MEASURED:
            self.began = time.perf_counter()

    def end(self, done: int) -> None:
        """Step number `done` is taken; after the last one that is measured, all is told, if any are left."""
        if len(self.seconds) == MEASURED:
            return
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        self.seconds.append(time.perf_counter() - self.began)
        if len(self.seconds) == MEASURED and done < self.max_steps:
            each = median(self.seconds[1:])
            announce(self.accelerator, outlook(each, self.max_steps - done, time.time()))


def outlook(each: float, left: int, now: float) -> str:
    """The line for steps of `each` seconds, of which so many are `left` at clock time `now` (seconds of the epoch)."""
    end = time.localtime(now + each * left)
    clock = time.strftime("%H:%M" if end[:3] == time.localtime(now)[:3] else "%Y-%m-%d %H:%M", end)
    what = f"pace: {per_second(1 / each, 'step')}; the other {left:,} take {roughly(each * left)}, until about {clock}"
    return f"{what}, besides validation and pictures"
