"""Batches of latents from the same shards in one process: shuffled and resumable here, webdataset's pipeline there.

An epoch of each. Ours is the loop's own reader: every sample once in an order keyed by (seed, epoch), from any step on.
Theirs is its documentation's: shards and a buffer shuffled, decoded, batched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from training.benchmarks.case import NOT_YET, OURS, SAME, SAME_SPEED, STOCK, STOCK_SPEED, Case, Contest, Place, peers
from training.benchmarks.reading import make
from training.data.latents import Latents
from training.data.loader import stream
from training.data.order import Batches, order_of
from training.shards.reading import ShardSet

BATCH = 64


class Reading(Case):
    kind = "latents"
    title = "latents of 16 KiB from shards, shuffled, in batches of 64, one process (`webdataset`)"
    lanes = gpu_lanes = (OURS, STOCK, SAME)
    targets = gpu_targets = (replace(STOCK_SPEED, least=12.0, checked=NOT_YET), SAME_SPEED)
    shape: ClassVar = (8, 32, 32)
    counts: ClassVar = {"smoke": 1024, "cpu": 8192, "gpu": 8192}

    def build(self, place: Place) -> Contest:
        self_destroying = tempfile.TemporaryDirectory(prefix="benchmark-")
        folder, count = Path(self_destroying.name), self.counts[place.size]
        make(folder, count, self.shape)
        data, steps = Latents(ShardSet(folder)), count // BATCH
        tars = [str(folder / info.name) for info in data.shards.shards]
        order, epoch = order_of(data, BATCH, 0), iter(range(10**6))

        def ours() -> Iterator[tuple[Tensor, list[str]]]:
            start = next(epoch) * steps
            for batch in stream(data, Batches(order, BATCH, 1, 0, 1, start, start + steps), 0):
                yield batch.data, batch.captions

        def theirs() -> Iterator[tuple[Tensor, list[str]]]:
            whole = peers("webdataset").WebDataset(tars, shardshuffle=100).shuffle(1000).decode()
            for moments, captions in whole.to_tuple("moments.npy", "txt").batched(BATCH):
                yield torch.from_numpy(moments).float(), captions

        def agree() -> None:
            a, b = sums(ours()), sums(theirs())
            assert a == b, f"{a} and {b}"
            assert self_destroying  # the files live as long as this is held

        return Contest({"ours": whole(ours), "peer": whole(theirs)}, agree, items=count, unit="latents")


def whole(read: Callable[[], Iterator[Any]]) -> Callable[[], int]:
    """Reads all there is."""
    return lambda: sum(len(captions) for _, captions in read())


def sums(batches: Iterator[tuple[Tensor, list[str]]]) -> tuple[float, list[str]]:
    """What does not depend on the order: the sum of all values, to six digits, and the captions."""
    total, captions = 0.0, list[str]()
    for data, more in batches:
        total += data.double().sum().item()
        captions += more
    return round(total, 6), sorted(captions)


CASES = (Reading(),)
