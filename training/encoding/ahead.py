"""Pictures decoded ahead of the encoder, by loader processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, zip_longest
from threading import Thread
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from training.data.images import Images
from training.data.loader import FEWER, Died, loaders, surviving
from training.errors import DISK, UserError
from training.shards.index import ShardInfo
from training.shards.remote import Remote

READ = 16  # pictures that a loader process decodes at a time, at most

Place = tuple[str, int]  # of a sample: its split, and its index there


def read_ahead(
    splits: Mapping[str, Images], shards: Sequence[ShardInfo], workers: int, batch: int
) -> Iterator[np.ndarray | UserError]:
    """Every picture of `shards`, or why it cannot be read, in order; `workers` processes decode ahead of who asks.

    They are about a `batch` ahead, so that the next is there when one is encoded, and memory follows the batch.
    """
    size = max(1, min(READ, batch))
    loader: Any = DataLoader(
        _Decoded(splits),
        batch_sampler=_some_at_once(splits, shards, size),  # any iterable will do
        collate_fn=list,
        **loaders(workers, max(2, math.ceil(batch / (size * max(1, workers))))),
    )
    return chain.from_iterable(_opened(loader))


def _opened(loader: Any) -> Iterator[list[np.ndarray | UserError]]:
    """What `loader` gives. Raises UserError (code 6) where a loader process dies: what is encoded stays, and is gone on
    from."""
    try:
        yield from surviving(loader)
    except Died as death:
        hint = f"{FEWER}; the same command goes on where this one stopped"
        raise UserError(f"a loader process died ({death.why})", hint=hint, code=DISK) from None


def _some_at_once(splits: Mapping[str, Images], shards: Sequence[ShardInfo], size: int) -> Iterator[list[Place]]:
    """The places of pictures, `size` at a time; at an address, the shard after this one is fetched meanwhile."""
    for info, following in zip_longest(shards, shards[1:]):
        shard_set = splits[info.split].shards
        if shard_set.remote and following and info.bytes + following.bytes <= shard_set.remote.limit:
            Thread(target=_fetch, args=(shard_set.remote, following), daemon=True).start()
        start = shard_set.start(info.name)
        for first in range(start, start + info.samples, size):
            yield [(info.split, index) for index in range(first, min(first + size, start + info.samples))]


def _fetch(remote: Remote, info: ShardInfo) -> None:
    """Into the cache; what fails is left to whoever reads it, who can say so."""
    with suppress(UserError):
        remote.fetch(info)


class _Decoded(Dataset[Any]):
    """Pictures by place; a UserError as a value: raised in a loader process it would lose its hint and code."""

    def __init__(self, splits: Mapping[str, Images]) -> None:
        self.splits = splits

    def __getitems__(self, places: list[Place]) -> list[np.ndarray | UserError]:
        return [self._decoded(*place) for place in places]

    def _decoded(self, split: str, index: int) -> np.ndarray | UserError:
        try:
            return self.splits[split].picture(index)
        except UserError as problem:
            return problem
