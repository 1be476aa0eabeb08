"""The micro-batches of a stream: samples as `Images` and `Latents` read them, numbered by the places they fill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from training.data.samples import LIMIT, SHOWN
from training.data.sharing import hand_over
from training.errors import DATA, UserError
from training.messages import warn
from training.shards.streaming import UNREAD

if TYPE_CHECKING:
    from training.data.order import Batches
    from training.data.samples import Batch, Samples
    from training.shards.streaming import Record

ALLOWED = 8  # samples of a stream that may be left out before `LIMIT`, here the share of what has come, counts
LOOK = "look at the shards with tar -t, or name others"


class Arrivals(IterableDataset["Batch | UserError | bytes"]):
    """Micro-batches of a stream: each slot takes the next record that can be read. For a `DataLoader` without batching.

    With `on_bad_data` "error" the first record that cannot be read is handed over as its UserError.
    """

    def __init__(self, samples: Samples[Any], batches: Batches) -> None:
        self.samples, self.batches = samples, batches

    def __iter__(self) -> Iterator[Batch | UserError | bytes]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = self.batches.process * workers + worker
        stream = replace(self.samples.shards.stream, start=self.batches.start)
        records = stream.shuffled(reader, self.batches.processes * workers)
        try:
            for number, slots in enumerate(self.batches):
                if number % workers == worker:
                    yield hand_over(self._filled(slots, records))
        except UserError as problem:
            yield problem

    def _filled(self, slots: list[Any], records: Iterator[Record]) -> Batch:
        arrived: dict[int, Record] = self.samples.shards.arrived
        loaded: list[Any] = []
        bad: dict[int, str] = {}
        for slot in slots:
            while True:
                record = arrived[slot.index] = next(records)
                sample = _unread(record) or self.samples.load([slot])[0]
                if not isinstance(sample, UserError):
                    loaded.append(sample)
                    break
                if self.samples.on_bad_data == "error":
                    raise sample
                bad[len(bad)] = sample.what
                if len(bad) > ALLOWED + len(slots):
                    raise too_many(bad, len(bad) + len(loaded))
        batch = self.samples.join(slots, loaded)
        arrived.clear()
        return batch._replace(bad=bad, indices=[slot.index for slot in slots])


def _unread(record: Record) -> UserError | None:
    return UserError(f"{record['__key__']}: {record[UNREAD]}", hint=LOOK, code=DATA) if UNREAD in record else None


def too_many(bad: Mapping[int, str], seen: int) -> UserError:
    """The error of a stream most of which cannot be read."""
    first = "; ".join(list(bad.values())[:SHOWN])
    return UserError(f"{len(bad):,} of {seen:,} samples of the stream cannot be read: {first}", hint=LOOK, code=DATA)


class Losses:
    """What of a stream could not be read (`bad`, by number), against what could. Raises UserError (code 3) beyond the
    limit."""

    def __init__(self, bad: dict[int, str]) -> None:
        self.seen, self.bad = 0, bad

    def count(self, batch: Batch) -> None:
        """Take note of one micro-batch."""
        self.seen += len(batch.slots)
        if batch.bad and len(self.bad) < SHOWN:
            warn(f"sample left out, another in its place: {next(iter(batch.bad.values()))}")
        for why in batch.bad.values():
            self.bad[-1 - len(self.bad)] = why  # below the numbers of the front
        if len(self.bad) > max(ALLOWED, LIMIT * self.seen):
            raise too_many(self.bad, self.seen + len(self.bad))
