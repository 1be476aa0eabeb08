"""The training's own loop on trial: its gradient steps alone, timed; nothing is shown, and nothing is kept."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training.benchmarks.meters import allocated, flops
from training.data.order import BucketOrder, Laid, Order, Slot, order_of
from training.loop.loop import Loop
from training.machine.compiling import compile_parts
from training.messages import SAID, hush
from training.planning.memory import Seen, Timeline, born
from training.stages.autoencoder import AutoencoderStage

if TYPE_CHECKING:
    from accelerate import Accelerator

    from training.loop.stage import Stage

UNTIMED = 4  # first steps, in which kernels are chosen and memory is found
WARM = 20  # steps, at most, until every optimiser has its moments: fp16 leaves out the first few
FAR = 10**9  # steps


class OneBucket(BucketOrder):
    """Of a single bucket, which fills a global batch: every step has its first samples, and again where it needs more.
    """

    def at(self, step: int, first: int, count: int) -> list[Slot]:
        """Slots [first, first + count) of the global batch of `step`."""
        laid, slots = Laid(self.buckets[0]), range(first, first + count)
        indices = laid(np.array(slots) % self.counts[0]).tolist()
        return [Slot(index, 0, self.place(step) + slot) for index, slot in zip(indices, slots, strict=True)]


class Trial(Loop):
    """The loop of a run from step `first` on, the last that the trial may take: by then all losses are at work.

    Its rate is 0, so that untrained weights stay where they are, whatever their gradients: a step costs the same.
    """

    def __init__(self, stage: Stage, config: Any, accelerator: Accelerator, folder: Path, first: int) -> None:
        self.given = config.train
        train = replace(config.train, max_steps=FAR, log_every=FAR, ema_every=FAR, compile=False)
        if isinstance(stage, AutoencoderStage) and stage.start is None:
            stage.start = 0  # a run waits for its plateau
        super().__init__(stage, train, config.optimizer, accelerator, folder, 1, 1, lambda _: 0.0)
        self.first, self.ends, self.flops = first, list[float](), 0.0
        self.order = largest(stage, self.given)

    def validate(self, step: int) -> None:
        """No pictures."""

    def save(self, step: int, *, wait: bool) -> None:
        """No checkpoints."""

    def step(self, step: int, rate: float) -> dict[str, Any]:
        """As ever; when it ended is noted."""
        values = super().step(step, rate)
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        self.ends.append(time.perf_counter())
        return values

    def split(self, micro: int, accumulation: int, workers: int = 0) -> None:
        """Have a step be so many backward passes of so many samples, read by `workers` processes."""
        self.passes.train = self.train = replace(self.train, num_workers=workers)
        self.passes.micro, self.passes.accumulation = micro, accumulation
        self.passes.read(self.order, self.first)

    def take(self) -> None:
        """One step, always the same."""
        self.gradients(self.first)
        self.step(self.first, 0.0)

    def warm_up(self, micro: int) -> None:
        """Steps until all that a training holds between two of them is there; one more counts the `flops` of a sample's
        gradients, forward and backward."""
        self.split(micro, 1)
        for _ in range(WARM):
            self.take()
            if all(optimizer.state for optimizer in self.optimizers.values()):
                break
        self.flops = flops(partial(self.gradients, self.first)) / micro
        self.take()  # as every step, without gradients of another

    def observe(self, micro: int, accumulation: int) -> Seen:
        """What a step of such a split holds, operation by operation, and at most."""
        self.split(micro, accumulation)
        self.passes.incoming = iter([next(self.passes.incoming) for _ in range(accumulation)])  # read beforehand
        timeline, births = Timeline(self.accelerator.device.type), list[tuple[int, int]]()

        def step() -> None:
            with timeline:
                self.gradients(self.first)
                births.extend(born(self.stage, timeline))
                self.step(self.first, 0.0)

        highest = allocated(step, self.accelerator.device.type)[1]
        return Seen(micro, timeline.line, births, highest)

    def peak(self, micro: int, accumulation: int) -> int:
        """Bytes that a step of such a split has at most, beyond what is there between two."""
        self.split(micro, accumulation)
        if self.given.compile:
            self.take()  # which compiles
        return allocated(self.take, self.accelerator.device.type)[1]

    def compile(self) -> None:
        """Compile what the run would; what was counted before was counted operation by operation."""
        compile_parts(self.stage.compiled_parts() if self.given.compile else ())

    def time(self, micro: int, accumulation: int, steps: int) -> tuple[list[float], float]:
        """Seconds of each of `steps`, without the first few, and the share of them spent waiting for data."""
        self.split(micro, accumulation, self.given.num_workers)
        self.train = replace(self.train, max_steps=self.first + steps)
        waited, begun = self.journal.waited, time.perf_counter()
        self.ends, quiet = [begun], SAID.quiet
        hush(True)  # when a run of so few steps would end is of no interest
        number = self.fit(self.first)
        hush(quiet)
        if number:
            raise SystemExit(128 + number)
        return steady(self.ends), (self.journal.waited - waited) / (self.ends[-1] - begun)


def largest(stage: Stage, train: Any) -> Order:
    """The order that memory is tried in: in buckets, of those that fill a global batch, that of most pixels alone; else
    the training's own."""
    buckets, dataset = stage.dataset.shards.buckets, stage.dataset
    full = {size: bucket for size, bucket in buckets.items() if sum(map(len, bucket)) >= train.batch_size}
    if not full:
        return order_of(dataset, train.batch_size, train.seed)
    return OneBucket((full[max(full, key=math.prod)],), train.batch_size, train.seed)


def steady(ends: list[float]) -> list[float]:
    """Seconds of each step by when it ended, the first number being the beginning; without the first few, at most half.
    """
    seconds = [end - start for start, end in pairwise(ends)]
    return seconds[min(UNTIMED, len(seconds) // 2) :]
