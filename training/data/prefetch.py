"""Reading ahead: the shards of the windows that come next are fetched while the batches of this one are read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from queue import SimpleQueue
from typing import TYPE_CHECKING

from training.data.order import DataOrder
from training.errors import DISK, UserError
from training.guarding import gigabytes
from training.machine.launcher import first_process
from training.messages import warn
from training.shards.index import is_mixed
from training.shards.remote import ROOM, Remote

if TYPE_CHECKING:
    from training.data.order import Batches, Slot
    from training.shards.index import ShardInfo
    from training.shards.reading import ShardSet


def prefetching(batches: Batches, shards: ShardSet) -> Batches | Prefetching:
    """The batches that a loader reads: of remote shards that ask for it, with the next window's fetched meanwhile.

    Raises UserError (code 6) where the cache cannot hold two windows.
    """
    if shards.remote is None:
        return batches
    if first_process():
        _warn_of_order(str(shards.remote), len(shards.shards), shards.remote.window, is_mixed(shards.summary))
    if not shards.remote.prefetch:
        return batches
    sizes = sorted(info.bytes for info in shards.shards)[-2 * shards.remote.window :]
    if sum(sizes) > shards.remote.limit:
        what = f"two windows of {shards.remote.window} shards ({gigabytes(sum(sizes))}) do not fit into the cache"
        raise UserError(f"{what} of {gigabytes(shards.remote.limit)}", hint=ROOM, code=DISK)
    return Prefetching(batches, shards.remote, shards.shards)


@cache
def _warn_of_order(address: str, shards: int, window: int, mixed: bool) -> None:
    """Once a process: batches of one kind of samples train badly, and nothing else would tell."""
    if shards > window and not mixed:
        what = f"{address}: packed in the order of its source; a window of {window} shards may hold few classes"
        warn(f"{what}; pack (and encode) them anew, which mixes all, or raise --train.window_shards")


class Prefetching:
    """Batches whose shards are fetched, in a thread, as their windows come near. A shard that cannot be fetched is left
    to whoever reads it, who can say so."""

    def __init__(self, batches: Batches, remote: Remote, shards: tuple[ShardInfo, ...]) -> None:
        self.batches, self.remote, self.shards = batches, remote, shards

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Slot]]:
        queue: SimpleQueue[tuple[int, ...] | None] = SimpleQueue()
        threading.Thread(target=self._fetch, args=(queue,), daemon=True).start()
        previous: tuple[int, ...] = ()
        try:
            for slots in self.batches:
                assert isinstance(self.batches.order, DataOrder)  # of shards that are numbered
                ahead = self.batches.order.ahead(slots[0].slot)
                if ahead != previous:
                    queue.put(ahead)
                    previous = ahead
                yield slots
        finally:
            queue.put(None)

    def _fetch(self, asked: SimpleQueue[tuple[int, ...] | None]) -> None:
        while (wanted := asked.get()) is not None:
            for number in wanted:
                if not asked.empty():
                    break
                with suppress(UserError):
                    self.remote.fetch(self.shards[number])
