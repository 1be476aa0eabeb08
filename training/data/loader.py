"""The micro-batches of a process, read ahead by loader processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from training.data.arrivals import Arrivals, Losses
from training.data.images import Images
from training.data.latents import Latents
from training.data.order import Batches, Slot
from training.data.prefetch import prefetching
from training.data.samples import Batch
from training.errors import UserError
from training.machine.signals import block_sigterm, shield
from training.shards.streaming import StreamedShards


def stream(dataset: Images | Latents, batches: Batches, workers: int, *, pin: bool = False) -> Iterator[Batch]:
    """The micro-batches of this process, in order, read ahead by `workers` processes."""
    how: dict[str, Any] = {"collate_fn": _whole, "pin_memory": pin, **loaders(workers, 4)}
    losses = Losses() if isinstance(dataset.shards, StreamedShards) else None
    loader: Any
    if losses:
        loader = DataLoader(Arrivals(dataset, batches), batch_size=None, **how)
    else:
        loader = DataLoader(_Fetched(dataset), batch_sampler=prefetching(batches, dataset.shards), **how)
    with block_sigterm():
        incoming = iter(loader)
    for batch in incoming:
        if isinstance(batch, UserError):
            raise batch
        if losses:
            losses.count(batch)
        elif workers:  # what a loader process counts, it counts in a copy
            dataset.count(batch.bad)
        yield batch


def loaders(workers: int, ahead: int) -> dict[str, Any]:
    """What a DataLoader is told of its processes, each `ahead` batches ahead of who asks."""
    # Forked, loaders are born with this process's answers to signals; a server of loaders would die of the first.
    context = "fork" if sys.platform == "linux" else None
    more = {"prefetch_factor": ahead, "worker_init_fn": shield, "multiprocessing_context": context} if workers else {}
    return {"num_workers": workers, **more}


class _Fetched(Dataset[Any]):
    """Hands a UserError over as a value: raised in a loader process, it would lose its hint and code."""

    def __init__(self, dataset: Images | Latents) -> None:
        self.dataset = dataset

    def __getitems__(self, slots: list[Slot]) -> Batch | UserError:
        try:
            return self.dataset.__getitems__(slots)
        except UserError as problem:
            return problem


def _whole(batch: Any) -> Any:
    return batch
