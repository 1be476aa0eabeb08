"""The micro-batches of a stream: samples as `Images` and `Latents` read them, numbered by the places they fill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from training.data.sharing import hand_over
from training.errors import DATA, UserError

if TYPE_CHECKING:
    from training.data.order import Batches
    from training.data.samples import Batch, Samples
    from training.shards.streaming import Record

LIMIT = 0.01  # the share of what has come that may be left out, once `ALLOWED` are
ALLOWED = 8


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
                sample = self.samples.load([slot])[0]
                if not isinstance(sample, UserError):
                    loaded.append(sample)
                    break
                if self.samples.on_bad_data == "error":
                    raise sample
                bad[len(bad)] = f"{record['__key__']}: {sample.what}"
        batch = self.samples.join(slots, loaded)
        arrived.clear()
        return batch._replace(bad=bad, indices=[slot.index for slot in slots])


class Losses:
    """What of a stream could not be read (`bad`, by number), against what could. Raises UserError (code 3) beyond the
    limit."""

    def __init__(self, bad: dict[int, str]) -> None:
        self.seen, self.bad = 0, bad

    def count(self, batch: Batch) -> None:
        """Take note of one micro-batch."""
        self.seen += len(batch.slots)
        for why in batch.bad.values():
            self.bad[len(self.bad)] = why
        if len(self.bad) > max(ALLOWED, LIMIT * self.seen):
            first = "; ".join(list(self.bad.values())[:5])
            what = f"{len(self.bad):,} of {self.seen + len(self.bad):,} samples of the stream cannot be read"
            raise UserError(f"{what}: {first}", hint="look at the shards with tar -t, or name others", code=DATA)
