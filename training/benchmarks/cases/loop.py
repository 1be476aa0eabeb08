"""The whole training loop beside the bare step: the same stage, network and optimiser, of ours alone.

The bare step has a batch at hand: gradients, clip, AdamW, average. The loop reads shards, judges every step, keeps the
journal, listens to signals and tells how fast it goes. Pictures and checkpoints are left out of both: how often they
are made is the user's; `benchmark.py durability` tells their share.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import nn

from training.benchmarks import durability
from training.benchmarks.case import Case, Contest, Lane, Place, Target
from training.benchmarks.meters import host_waits
from training.benchmarks.reading import make
from training.data.latents import Latents
from training.loop.loop import Loop
from training.shards.reading import ShardSet

WHOLE, BARE = Lane("whole loop", "loop"), Lane("bare step", "bare")


class WholeLoop(Case):
    kind = "loop"
    title = "the whole loop beside its bare step (a DiT with a text encoder that learns)"
    lanes = gpu_lanes = (WHOLE, BARE)
    cost: ClassVar = Target(name="time, whole loop over bare step", over=WHOLE.name, under=BARE.name, most=1.03)
    targets = gpu_targets = (cost,)
    # (config, latents a side, batch, steps a call)
    sizes: ClassVar = {"smoke": ("smoke", 8, 32, 10), "cpu": ("dit-s", 16, 16, 3), "gpu": ("dit-b", 32, 256, 20)}

    def build(self, place: Place) -> Contest:
        config, side, batch, steps = self.sizes[place.size]
        home = tempfile.TemporaryDirectory(prefix="benchmark-")
        shards, run = Path(home.name) / "shards", Path(home.name) / "run"
        shards.mkdir()
        run.mkdir()
        make(shards, 8 * batch, (8, side, side))
        loop = durability.begin(SimpleNamespace(config=config, batch_size=batch, side=side, device=place.device), run,
                                Latents(ShardSet(shards)))  # fmt: skip
        left_out: Any = loop
        left_out.validate = left_out.save = lambda *_, **__: None
        batch_at_hand = next(loop.passes.incoming)

        def whole() -> None:
            loop.train = replace(loop.train, max_steps=loop.done + steps)
            with contextlib.redirect_stderr(io.StringIO()):
                loop._steps(loop.done)

        def bare() -> None:
            for _ in range(steps):
                step(loop, batch_at_hand)

        def agree() -> None:
            assert home and loop.done == 0
            whole()
            assert loop.done == steps

        def waiting() -> float:
            waited, since = loop.journal.waited, time.perf_counter()
            whole()
            return (loop.journal.waited - waited) / (time.perf_counter() - since)

        facts: dict[str, Callable[[], float]] = {"share of the time waiting for data": waiting}
        if place.device == "cuda":
            facts["waits for the GPU a step"] = lambda: host_waits(bare) / steps
        return Contest({"loop": whole, "bare": bare}, agree, items=steps * batch, facts=facts)


def step(loop: Loop, batch: Any) -> None:
    """What no training can do without."""
    stage, number = loop.stage, loop.done
    stage.backward(batch, number, 1.0)
    stage.after_backward(number)
    for optimizer in loop.optimizers.values():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, loop.settings.clip or float("inf"))
        optimizer.step()
    loop.ema.update()
    for optimizer in loop.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    stage.after_step(number, taken=True)


CASES = (WholeLoop(),)
