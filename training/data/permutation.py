"""An epoch's permutation of the samples, asked for place by place: by rule 2, next to nothing of it is held.

Rule 1, that of runs begun before there was another: drawn whole by numpy's generator, 8 bytes a sample. Rule 2: a keyed
permutation, computed at the places asked for. A run keeps the rule it began with (training/loop/passes.py).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

import numpy as np

from training.errors import CHECKPOINT, UserError

RULE = 2  # of runs begun now
# Rounds, by measuring a million keys each (chi-square). Of 5 and 6 things not all permutations are equally likely with
# 16, and no difference is seen with 20; of where any two of 100 things go, that is so with 6 and with 8.
FEW, ROUNDS = 100, (24, 12)  # of fewer than so many things, and of others
# What a permutation is of; rule 1 drew from the streams of 0 and 1.
FOLDER, SHARDS, WINDOW, BATCHES, BUCKET = 2, 3, 4, 5, 6
WINDOWS = 4  # of an epoch, whose permutations are held


class Shuffle:
    """A permutation of [0, n) keyed by (seed, epoch, use, number), asked for place by place.

    A Feistel network (Luby & Rackoff 1988) over x = l b + r, l < a, r < b, its rounds l <- l + F(r) mod a and
    r <- r + G(l) mod b in turn, a b >= n; what falls beyond n goes through it again (Black & Rogaway 2002, cycle
    walking). a and b are close to sqrt(n), so that F and G can be tables, 48 sqrt(n) bytes in all (1.5 MB a billion),
    drawn from Philox's raw numbers, which are those of every version of numpy. b is even: were both odd, no odd
    permutation would come.
    """

    def __init__(self, n: int, seed: int, epoch: int, use: int, number: int = 0) -> None:
        self.n, self.a = n, math.isqrt(max(0, n - 1)) + 1
        self.b = 2 * -(-n // (2 * self.a))
        draw = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=[0, number, 0, use])
        raw = draw.random_raw((ROUNDS[n >= FEW] // 2, self.a + self.b)) >> np.uint64(32)
        left, right = raw[:, : self.b] * np.uint64(self.a), raw[:, self.b :] * np.uint64(self.b)
        tables = [(part >> np.uint64(32)).astype(np.uint32) for part in (left, right)]
        self.rounds = list(zip(*tables, strict=True))

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at `places` (k,) int64 in [0, n)."""
        found = self._once(places)
        while len(beyond := np.flatnonzero(found >= self.n)):
            found[beyond] = self._once(found[beyond])
        return found

    def _once(self, x: np.ndarray) -> np.ndarray:
        left, right = (part.astype(np.uint32) for part in np.divmod(x, self.b))
        a, b = np.uint32(self.a), np.uint32(self.b)
        for f, g in self.rounds:
            left = left + f.take(right)
            left = np.minimum(left, left - a)  # modulo a, of less than 2 a: what is less than 0 is huge without a sign
            right = right + g.take(left)
            right = np.minimum(right, right - b)
        return left.astype(np.int64) * self.b + right


class Epoch(Protocol):
    """One epoch's permutation."""

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The samples at `positions` (k,) int64 of the epoch."""


class Windows(Epoch, Protocol):
    """One epoch's permutation of shards, and of samples within each window of them."""

    def window(self, position: int) -> int:
        """The number of the window that a position lies in."""

    def group(self, number: int) -> tuple[int, ...]:
        """The shards of a window, none beyond the last."""

    def holding(self, shard: int) -> tuple[int, ...]:
        """The shards of the window that a shard is in."""


class Whole:
    """An epoch of a folder by rule 1."""

    def __init__(self, samples: int, seed: int, epoch: int) -> None:
        draw = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
        self.order = draw.permutation(samples)

    def at(self, positions: np.ndarray) -> np.ndarray:
        return np.take(self.order, positions)


class Keyed(Shuffle):
    """An epoch of a folder by rule 2."""

    def __init__(self, samples: int, seed: int, epoch: int) -> None:
        super().__init__(samples, seed, epoch, FOLDER)

    def at(self, positions: np.ndarray) -> np.ndarray:
        return self(positions)


class _Groups:
    """Mixed shards in groups of `size`: which, and the positions at which each ends."""

    def __init__(self, mixed: np.ndarray, samples: np.ndarray, size: int) -> None:
        self.mixed, self.samples, self.size = mixed, samples, size
        self.starts = np.cumsum(samples) - samples
        self.ends = np.cumsum(np.add.reduceat(samples[mixed], np.arange(0, len(mixed), size)))

    def window(self, position: int) -> int:
        return int(np.searchsorted(self.ends, position, side="right"))

    def group(self, number: int) -> tuple[int, ...]:
        return tuple(self.mixed[number * self.size : (number + 1) * self.size].tolist())

    def holding(self, shard: int) -> tuple[int, ...]:
        return self.group(int(np.flatnonzero(self.mixed == shard)[0]) // self.size)


class WholeWindows(_Groups):
    """An epoch of shards at an address by rule 1."""

    def __init__(self, shards: np.ndarray, size: int, seed: int, epoch: int) -> None:
        key = np.array([seed, epoch], np.uint64)
        draw = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1]))
        super().__init__(draw.permutation(len(shards)), shards, size)
        groups = [self.group(number) for number in range(len(self.ends))]
        parts = [np.concatenate([self.starts[s] + np.arange(shards[s]) for s in group]) for group in groups]
        self.order = np.concatenate([draw.permutation(part) for part in parts])

    def at(self, positions: np.ndarray) -> np.ndarray:
        return np.take(self.order, positions)


class KeyedWindows(_Groups):
    """An epoch of shards at an address by rule 2: 24 bytes a shard are held, of samples nothing."""

    def __init__(self, shards: np.ndarray, size: int, seed: int, epoch: int) -> None:
        self.seed, self.epoch = seed, epoch
        super().__init__(Shuffle(len(shards), seed, epoch, SHARDS)(np.arange(len(shards))), shards, size)
        self.within = lru_cache(maxsize=WINDOWS)(self._within)

    def at(self, positions: np.ndarray) -> np.ndarray:
        numbers, found = np.searchsorted(self.ends, positions, side="right"), np.empty_like(positions)
        for number in dict.fromkeys(numbers.tolist()):
            here, (begins, shuffle, ends, shift) = numbers == number, self.within(number)
            mixed = shuffle(positions[here] - begins)
            found[here] = mixed + shift[np.searchsorted(ends, mixed, side="right")]
        return found

    def _within(self, number: int) -> tuple[int, Shuffle, np.ndarray, np.ndarray]:
        """Where a window begins, its permutation, where its shards end in it, and what is to be added in each."""
        group = np.array(self.group(number))
        ends = np.cumsum(self.samples[group])
        shuffle = Shuffle(int(ends[-1]), self.seed, self.epoch, WINDOW, number)
        return int(self.ends[number] - ends[-1]), shuffle, ends, self.starts[group] - ends + self.samples[group]


def check_rule(rule: int) -> None:
    """Raises UserError for a rule that is not known here."""
    if not 1 <= rule <= RULE:
        what = f"this run takes its samples in an order of rule {rule}; this program understands 1 to {RULE}"
        raise UserError(what, hint="update it", code=CHECKPOINT)


def folder_epoch(rule: int, samples: int, seed: int, epoch: int) -> Epoch:
    """An epoch of samples that are mixed as one."""
    return (Whole if rule == 1 else Keyed)(samples, seed, epoch)


def windows_epoch(rule: int, shards: np.ndarray, size: int, seed: int, epoch: int) -> Windows:
    """An epoch of `shards` (their samples), mixed `size` at a time."""
    return (WholeWindows if rule == 1 else KeyedWindows)(shards, size, seed, epoch)
