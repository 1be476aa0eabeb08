"""Which sample fills which slot: a pure function of (seed, step), whatever the world size, workers and micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from training.data.permutation import (
    BATCHES,
    BUCKET,
    RULE,
    Epoch,
    Shuffle,
    Windows,
    check_rule,
    folder_epoch,
    windows_epoch,
)
from training.errors import DATA, UserError

EPOCHS = 3  # of which something is held: this one and the next, and that of a place asked for otherwise


class Slot(NamedTuple):
    """One place of one global batch: sample `index` of the split in its `epoch`-th pass; `slot` counts all places."""

    index: int  # type: ignore[assignment]  # hides tuple.index, of which slots have no use
    epoch: int
    slot: int


SLOT: Callable[[tuple[int, int, int]], Slot] = partial(tuple.__new__, Slot)  # twice as fast as to call it by name


@dataclass(frozen=True)
class DataOrder:
    """A keyed permutation per epoch, epochs joined end to end: place p holds permutation(p // n)[p % n].

    Every sample is seen exactly once an epoch. Step `base[0]` begins at place `base[1]`, which is its step times the
    batch size unless a run went on with another batch. Where `shards` gives the samples of each shard, the permutation
    has two levels: shards, then samples within each `window` of them. `rule` is how it is drawn (permutation.py).
    Raises UserError where there are fewer samples than one global batch, and for a rule that is not known here.
    """

    samples: int
    batch_size: int
    seed: int
    base: tuple[int, int] = (0, 0)
    shards: tuple[int, ...] = ()
    window: int = 0
    rule: int = RULE

    def __post_init__(self) -> None:
        check_rule(self.rule)
        if self.samples < self.batch_size:
            hint = f"--batch-size {max(1, self.samples)} at the most, or pack more images"
            what = f"dataset has {self.samples} samples, fewer than one global batch ({self.batch_size})"
            raise UserError(what, hint=hint, code=DATA)

    def at(self, step: int, first: int, count: int) -> list[Slot]:
        """Slots [first, first + count) of the global batch of `step`."""
        begin, slots = self.place(step) + first, list[Slot]()
        for epoch in range(begin // self.samples, (begin + count - 1) // self.samples + 1):
            start = epoch * self.samples
            places = range(max(begin, start), min(begin + count, start + self.samples))
            found = self._epoch(epoch).at(np.arange(places.start - start, places.stop - start))
            slots += map(SLOT, zip(found.tolist(), repeat(epoch), places))
        return slots

    def ahead(self, place: int) -> tuple[int, ...]:
        """The shards of the window that `place` lies in, then those of the next."""
        epoch, position = divmod(place, self.samples)
        windows = self._windows(epoch)
        number = windows.window(position)
        return windows.group(number) + (windows.group(number + 1) or self._windows(epoch + 1).group(0))

    @cached_property
    def _epoch(self) -> Callable[[int], Epoch]:
        folder = partial(folder_epoch, self.rule, self.samples, self.seed)
        return self._windows if self.shards else lru_cache(maxsize=EPOCHS)(folder)

    @cached_property
    def _windows(self) -> Callable[[int], Windows]:
        windows = partial(windows_epoch, self.rule, np.array(self.shards), self.window, self.seed)
        return lru_cache(maxsize=EPOCHS)(windows)

    def place(self, step: int) -> int:
        """Where the global batch of `step` begins: the samples seen before it."""
        return self.base[1] + (step - self.base[0]) * self.batch_size


@dataclass(frozen=True)
class BucketOrder:
    """Every batch of samples of one bucket, of which `buckets` gives the numbers, range by range.

    An epoch has as many batches of each bucket as it fills: B = sum over buckets of n_b // batch_size. Batch k of epoch
    e is that at place permutation(e)[k] of all B, those of the first bucket first; and the i-th of bucket b holds
    permutation(e, b)[i batch_size : (i + 1) batch_size] of its samples. Each is seen at most once an epoch; what a
    bucket holds beyond whole batches is left out, each epoch others. Places count the samples of whole batches. After a
    change of the batch size the epoch is that which the place lies in by the new one, so that samples of the epoch in
    which it changed may come twice, or not.
    Raises UserError where no bucket fills one global batch, and for a rule that is not known here.
    """

    buckets: tuple[tuple[range, ...], ...]
    batch_size: int
    seed: int
    base: tuple[int, int] = (0, 0)
    rule: int = RULE

    def __post_init__(self) -> None:
        check_rule(self.rule)
        if not self.batches:
            most = max(self.counts)
            what = f"no bucket has as many samples as one global batch ({self.batch_size}): the largest has {most}"
            hint = f"--batch-size {most} at the most, or pack more images, or into fewer buckets: --buckets 3"
            raise UserError(what, hint=hint, code=DATA)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The samples of each bucket."""
        return tuple(sum(map(len, ranges)) for ranges in self.buckets)

    @cached_property
    def batches(self) -> int:
        """Those of an epoch."""
        return int(self._ends[-1])

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([count // self.batch_size for count in self.counts])

    def at(self, step: int, first: int, count: int) -> list[Slot]:
        """Slots [first, first + count) of the global batch of `step`."""
        begin = self.place(step)
        epoch, number = divmod(begin // self.batch_size, self.batches)
        batch = int(self._mixed(epoch)(np.array([number]))[0])
        bucket = int(np.searchsorted(self._ends, batch, side="right"))
        own = batch - int(self._ends[bucket]) + self.counts[bucket] // self.batch_size  # among those of its bucket
        start = own * self.batch_size + first
        found = self._within(epoch, bucket)(np.arange(start, start + count))
        indices = self._laid[bucket](found)
        return list(map(SLOT, zip(indices.tolist(), repeat(epoch), range(begin + first, begin + first + count))))

    @cached_property
    def _laid(self) -> tuple[Laid, ...]:
        return tuple(map(Laid, self.buckets))

    @cached_property
    def _mixed(self) -> Callable[[int], Shuffle]:
        return lru_cache(maxsize=EPOCHS)(lambda epoch: Shuffle(self.batches, self.seed, epoch, BATCHES))

    @cached_property
    def _within(self) -> Callable[[int, int], Shuffle]:
        held = EPOCHS * len(self.buckets)
        return lru_cache(maxsize=held)(lambda e, b: Shuffle(self.counts[b], self.seed, e, BUCKET, b))

    def place(self, step: int) -> int:
        """Where the global batch of `step` begins: the samples seen before it."""
        return self.base[1] + (step - self.base[0]) * self.batch_size


class Laid:
    """Ranges of samples joined end to end, asked for by places of the whole; 16 bytes a range are held."""

    def __init__(self, ranges: tuple[range, ...]) -> None:
        self.ends = np.cumsum([len(part) for part in ranges])
        self.shifts = np.array([part.stop for part in ranges]) - self.ends

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """The samples at `places` (k,) int64."""
        found: np.ndarray = places + self.shifts[np.searchsorted(self.ends, places, side="right")]
        return found


@dataclass(frozen=True)
class StreamOrder:
    """Places of a stream, whose samples have no numbers of their own: slot p takes whatever sample comes p-th."""

    batch_size: int
    base: tuple[int, int] = (0, 0)

    def at(self, step: int, first: int, count: int) -> list[Slot]:
        """Slots [first, first + count) of the global batch of `step`."""
        return [Slot(p, 0, p) for p in range(self.place(step) + first, self.place(step) + first + count)]

    def place(self, step: int) -> int:
        """Where the global batch of `step` begins: the samples seen before it."""
        return self.base[1] + (step - self.base[0]) * self.batch_size


Order = DataOrder | BucketOrder | StreamOrder


def order_of(
    dataset: Any, batch_size: int, seed: int, base: tuple[int, int] = (0, 0), rule: int = RULE
) -> Order:
    """Which sample of a data set fills which slot. Raises UserError where there are fewer than one global batch, and
    for buckets at an address."""
    if dataset.shards.windows is None:
        return StreamOrder(batch_size, base)
    if buckets := dataset.shards.buckets:
        if dataset.shards.remote:
            what = f"{dataset.shards.remote}: shards of several buckets are mixed as a whole, not window by window"
            raise UserError(what, hint="copy them into a folder here, and name that", code=DATA)
        return BucketOrder(tuple(buckets.values()), batch_size, seed, base, rule)
    shards, window = dataset.shards.windows or ((), 0)
    return DataOrder(len(dataset), batch_size, seed, base, shards, window, rule)


def substitute(
    slot: Slot, attempt: int, samples: int, seed: int, shards: tuple[int, ...] = (), window: int = 0, rule: int = RULE
) -> Slot:
    """Who stands in where the sample of `slot` cannot be read: drawn by (seed, slot, attempt), the slot kept.

    Of a split in windows of shards, from the shards of its own window: any other would have to be fetched for it.
    """
    draw = np.random.default_rng([seed, slot.slot, attempt])
    if not shards:
        return slot._replace(index=int(draw.integers(samples)))
    ends = np.cumsum(shards)
    own = int(np.searchsorted(ends, slot.index, side="right"))
    group = _windows_of(rule, shards, window, seed, slot.epoch).holding(own)
    place = int(draw.integers(sum(shards[n] for n in group)))
    for n in group:
        if place < shards[n]:
            return slot._replace(index=int(ends[n]) - shards[n] + place)
        place -= shards[n]
    raise AssertionError("a place lies in one of the shards")


def substitute_alike(slot: Slot, attempt: int, seed: int, bucket: tuple[range, ...]) -> Slot:
    """The same where samples are in buckets: drawn from those of its `bucket`."""
    draw = np.random.default_rng([seed, slot.slot, attempt])
    laid = Laid(bucket)
    return slot._replace(index=int(laid(np.array([draw.integers(laid.ends[-1])]))[0]))


@lru_cache(maxsize=EPOCHS)
def _windows_of(rule: int, shards: tuple[int, ...], window: int, seed: int, epoch: int) -> Windows:
    return windows_epoch(rule, np.array(shards), window, seed, epoch)


@dataclass(frozen=True)
class Batches:
    """The micro-batches of one process from step `start` on, as lists of slots: a batch sampler for DataLoader.

    Global batch = processes x accumulation x micro; backward pass a of process r takes block r of stripe a.
    """

    order: Order
    micro: int
    accumulation: int
    process: int
    processes: int
    start: int
    stop: int

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[Slot]]:
        for step in range(self.start, self.stop):
            for part in range(self.accumulation):
                yield self.share(step, part, self.process)

    def share(self, step: int, part: int, process: int) -> list[Slot]:
        """The slots of backward pass `part` of `process`."""
        return self.order.at(step, (part * self.processes + process) * self.micro, self.micro)


def split_batch(
    batch: int, micro: int, accumulation: int | None, processes: int, *, explicit_batch: bool = True
) -> tuple[int, int, int]:
    """Settle (global batch, micro-batch, accumulation) so that batch = processes * micro * accumulation.

    Raises UserError naming the nearest global batch that divides.
    """
    if accumulation is not None and accumulation < 1:
        raise UserError(f"--gradient-accumulation-steps: must be >= 1 (got {accumulation})")
    if not explicit_batch and micro:
        batch = micro * processes * (accumulation or 1)
    unit = processes * (micro or 1) * (accumulation or 1)
    is_exact = bool(micro and accumulation)  # both given: only one global batch is their product
    if batch % unit or (is_exact and batch != unit):
        nearest = [unit] if is_exact else sorted({max(unit, batch // unit * unit), (batch // unit + 1) * unit})
        raise UserError(
            f"train.batch_size {batch} cannot be split over {processes} process(es)"
            f" with train.micro_batch_size {micro or 'unset'}"
            f" and {accumulation or 'any number of'} accumulation step(s)",
            hint=f"nearest --batch-size: {' or '.join(map(str, nearest))}",
        )
    micro = micro or batch // unit
    return batch, micro, batch // (processes * micro)
