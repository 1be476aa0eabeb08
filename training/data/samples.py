"""What a training step reads: the samples of given slots as whole batches, whatever they hold."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ldm.conditioning import Cond
from ldm.noise import Noise
from training.commands import door
from training.data.order import Laid, Slot, substitute, substitute_alike
from training.data.permutation import RULE
from training.errors import DATA, NUMERICAL, Unreachable, UserError
from training.messages import warn
from training.progress import Progress

if TYPE_CHECKING:
    from training.shards.reading import ShardSet
    from training.shards.streaming import StreamedShards

Policy = Literal["error", "skip"]
LIMIT = 0.01  # the share of a split that may be left out, at least one sample; beyond it the data are not sound
ATTEMPTS = 8  # unreadable samples drawn for one slot before reading is given up
SHOWN = 5  # of the samples left out
Loaded = TypeVar("Loaded")

NO_WINDOWS: tuple[tuple[int, ...], int] = ((), 0)  # of the front of a stream, which lies in memory

class Batch(NamedTuple):
    """One micro-batch. `data`: images uint8 (B,3,H,W) or moments (B,2C,h,w); `slots` (B,) int64 seed its randomness."""

    data: Tensor
    slots: Tensor
    captions: list[str]
    text: Cond | None = None  # stored text embeddings, as they are stored, where the shards hold them
    bad: Mapping[int, str] = {}  # samples that could not be read, another in the slot of each: index -> why
    indices: Sequence[int] = ()  # the sample in each slot
    extras: Mapping[str, Tensor] = {}  # (B, ...) by name, for `Cond.extras`; pictures in [0, 1]


class Samples(Dataset[Batch], ABC, Generic[Loaded]):
    """The samples of a split by slot.

    One that cannot be read follows `on_bad_data`: "error" raises its UserError; "skip" fills its slot with another,
    drawn by (seed, slot), says so once, and counts it in `bad`. Raises UserError(code 3) where more than 1 % of the
    split (at least one sample) is left out.
    """

    def __init__(self, shards: ShardSet | StreamedShards, seed: int, on_bad_data: Policy) -> None:
        self.shards: Any = shards  # of what both kinds offer
        self.seed, self.on_bad_data = seed, on_bad_data
        self.rule = RULE  # of the order that the samples are taken in
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.shards)

    @cached_property
    @abstractmethod
    def plain(self) -> Self:
        """The same samples as validation reads them: none mirrored, of several captions the one that seed 0 gives."""

    @abstractmethod
    def load(self, slots: list[Slot]) -> list[Loaded | UserError]:
        """The sample of each slot, or why it cannot be read."""

    @abstractmethod
    def join(self, slots: list[Slot], samples: list[Loaded]) -> Batch:
        """The samples of slots as one batch."""

    def __getitems__(self, slots: list[Slot]) -> Batch:
        places, reasons = list(slots), {}
        samples = self.load(places)
        for attempt in range(ATTEMPTS):
            failures = [(i, sample) for i, sample in enumerate(samples) if isinstance(sample, UserError)]
            if not failures:
                break
            for i, problem in failures:
                if self.on_bad_data == "error" or attempt == ATTEMPTS - 1:
                    raise problem
                reasons[places[i].index] = problem.what
                places[i] = self._another(slots[i], attempt)
            for (i, _), sample in zip(failures, self.load([places[i] for i, _ in failures]), strict=True):
                samples[i] = sample
        batch = self.join(places, [sample for sample in samples if not isinstance(sample, UserError)])
        batch = batch._replace(bad=reasons, indices=[slot.index for slot in places])
        if get_worker_info() is None:
            self.count(reasons)
        return batch

    def _another(self, slot: Slot, attempt: int) -> Slot:
        if buckets := self.shards.buckets:
            return substitute_alike(slot, attempt, self.seed, buckets[self.shards.size_of(slot.index)])
        windows = self.shards.windows or NO_WINDOWS
        return substitute(slot, attempt, len(self), self.seed, windows[0], windows[1], self.rule)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([Slot(index, 0, index)])

    def evenly(self, count: int, size: tuple[int, int] = (0, 0)) -> Sequence[int]:
        """`count` places evenly over the split, or over its bucket of `size`, or all where it is 0 or more than there
        are.

        Packed folders lie class after class, so the first samples are of few classes. Of shards at an address, each of
        which must be fetched, a window's number is looked into, themselves evenly chosen: more where they hold too few.
        """
        if bucket := self.shards.buckets.get(size):
            total = sum(map(len, bucket))
            chosen = _spread(count, total) if 0 < count < total else range(total)
            return [int(place) for place in Laid(bucket)(np.array(chosen))]
        if not 0 < count < len(self):
            return range(len(self))
        sizes, window = self.shards.windows or NO_WINDOWS
        if not sizes:
            return _spread(count, len(self))
        ends = np.cumsum(sizes)
        for shards in range(min(window, len(sizes)), len(sizes) + 1):
            chosen = _spread(shards, len(sizes))
            places = [place for n in chosen for place in range(ends[n] - sizes[n], ends[n])]
            if len(places) >= count:
                break
        return [places[i] for i in _spread(count, len(places))]

    def alike(self, places: Sequence[int]) -> list[Sequence[int]]:
        """The places in order, cut where one sample is of another bucket than the one before it."""
        if not self.shards.buckets:
            return [places]
        return [list(run) for _, run in groupby(places, self.shards.size_of)]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of all buckets; empty where samples are in none."""
        return list(self.shards.buckets)

    def chunks(self, places: Sequence[int], size: int, doing: str = "") -> Iterator[Batch]:
        """The samples at `places` as the first epoch has them, `size` at once, fewer where the next are of another
        bucket; a line tells how far it is that is `doing` with them."""
        runs = self.alike(places)
        parts = (run[start : start + size] for run in runs for start in range(0, len(run), size))
        batches = (self.__getitems__([Slot(place, 0, place) for place in part]) for part in parts)
        told = Progress(doing, len(places), "sample", aloud=bool(doing))
        return told.each(batches, lambda batch: len(batch.slots))

    def count(self, bad: Mapping[int, str]) -> None:
        """Takes note of samples left out. Raises UserError (code 3) beyond the limit."""
        for index, why in bad.items():
            if index not in self.bad and len(self.bad) < SHOWN:
                warn(f"sample left out, another in its place: {why}")
            self.bad[index] = why
        # Of a stream, only its front has numbers here: all that came is judged by `arrivals.Losses`.
        if self.shards.windows is not None and len(self.bad) > math.ceil(LIMIT * len(self)):
            first = "; ".join(list(self.bad.values())[:SHOWN])
            what = f"{len(self.bad):,} of {len(self):,} samples cannot be read, more than {LIMIT:.0%}: {first}"
            raise UserError(what, hint=f"run: {door('make_shards verify', self.shards.directory)}", code=DATA)


def _spread(count: int, total: int) -> list[int]:
    """`count` of the numbers below `total`, evenly."""
    return [i * total // count for i in range(count)]


def or_error(read: Callable[..., Loaded], *arguments: Any) -> Loaded | UserError:
    """What `read` gives, or why it could not."""
    try:
        return read(*arguments)
    except UserError as problem:
        if isinstance(problem, Unreachable) or problem.code not in (DATA, NUMERICAL):
            raise
        return problem


def ids(slots: list[Slot]) -> Tensor:
    """The slots' numbers (B,) int64, by which every draw of a training is keyed."""
    return torch.tensor([s.slot for s in slots], dtype=torch.int64)


def uniform(slots: list[Slot], seed: int, purpose: str) -> Tensor:
    """One number in (0, 1) per slot, a function of (seed, epoch, sample, purpose)."""
    sample = Noise(torch.tensor([s.index for s in slots], dtype=torch.int64))
    by_epoch = {e: sample.uniform((1,), seed, e, purpose)[:, 0] for e in {s.epoch for s in slots}}
    return torch.stack([by_epoch[s.epoch][i] for i, s in enumerate(slots)])


def coin(slots: list[Slot], seed: int, purpose: str) -> Tensor:
    """One truth of even odds per slot (B,) bool, a function of (seed, epoch, sample, purpose)."""
    return uniform(slots, seed, purpose) < 0.5
