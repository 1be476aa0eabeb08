"""Shards: plain webdataset tars, each with an offset index beside it, and one `index.json` for the folder.

    DIR/train-000000.tar        KEY.png, KEY.txt, KEY.json … ; readable by anything that reads tars
    DIR/train-000000.index.npy  per sample: key, and per field offset and size
    DIR/index.json              format, kind, fields, per shard name, split, samples, bytes, sha256; summary

Every file is staged under a temporary name, synced and renamed, the tar last: a tar under its final name is whole.
`index.json` comes last of all, so a folder that has one is complete. Several processes may each write shards of their
own; one then writes the index.
"""

from __future__ import annotations

import math
import os
from array import array
from bisect import bisect_right
from collections.abc import Container
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from pathlib import Path
from struct import error as StructError
from typing import Any, NamedTuple

from training.commands import door
from training.errors import DATA, UserError
from training.guarding import leads_out
from training.messages import note, warn
from training.shards.index import INDEX, Kind, ShardInfo, Size, read_index
from training.shards.offset_index import Descriptors, Layout, Place, index_path, members, open_index, reindex_hint
from training.shards.remote import Remote
from training.shards.tars import is_safe

COMPARED = 10  # held-out pictures from which on they are compared as a set
OPEN_FILES = 256  # per ShardSet and process; most systems allow a process 1024
AT_THE_START = 1000  # shards up to which every offset index is opened at the start; of more, each when it is first read
HELD = 1024  # shards per ShardSet and process of which it is held where their files lie, and how the index is laid out


class Found(NamedTuple):
    """Where the files of a shard lie, and how its offset index is laid out."""

    tar: str
    offsets: str
    layout: Layout


class ShardSet:
    """One split of a folder of shards, read by position: `len`, `key(i)`, `read(i)`, `read_field(i, field)`.

    Rows and data are read when asked for, in whichever process asks; pickling carries the path alone. Of a shard, what
    `index.json` says of it is held. Raises UserError(code 3) where the folder has no index or no such split, or where a
    shard is not as long as its index says; of more than AT_THE_START shards when reading, where an offset index is
    missing or damaged; when reading, where the data are not where the index says.
    """

    def __init__(self, directory: str | Path | Remote, split: str = "train") -> None:
        self.directory, self.split = Path(directory), split
        self.remote = directory if isinstance(directory, Remote) else None
        index, shards = read_index(directory)
        self.kind: Kind = index["kind"]
        self.fields: tuple[str, ...] = tuple(index["fields"])
        self.summary: dict[str, Any] = index["summary"]
        self.shards = tuple(info for info in shards if info.split == split)
        if not self.shards:
            names = ", ".join(sorted({info.split for info in shards}))
            what = f"{directory} has no split {split!r} (it has: {names})"
            raise UserError(what, hint=lacking_hint(split), code=DATA)
        self._ends = array("q", accumulate(info.samples for info in self.shards))
        self._files, self._found = Descriptors(OPEN_FILES), lru_cache(maxsize=HELD)(partial(_found, directory))
        if self.remote is None:
            for info in self.shards:
                _check(self.directory, info)
        if len(self.shards) <= AT_THE_START:
            if self.remote:
                self.remote.bring(index_path(Path(info.name)).name for info in self.shards)
            for info in self.shards:
                self._found(info)

    def __reduce__(self) -> tuple[type[ShardSet], tuple[Path | Remote, str]]:
        return ShardSet, (self.remote or self.directory, self.split)

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self._files.close()

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def windows(self) -> tuple[tuple[int, ...], int]:
        """How a training mixes the split, as `DataOrder` takes it: the samples of each shard, the shards of a window;
        () and 0 where the shards are local: these are mixed as one."""
        return (tuple(info.samples for info in self.shards), self.remote.window) if self.remote else ((), 0)

    @cached_property
    def buckets(self) -> dict[Size, tuple[range, ...]]:
        """The samples of each size, shard by shard, sizes in their order; empty where shards are not of one size each.
        """
        found: dict[Size, tuple[range, ...]] = {}
        for info, end in zip(self.shards, self._ends, strict=True):
            if info.size:
                found[info.size] = (*found.get(info.size, ()), range(end - info.samples, end))
        return dict(sorted(found.items()))

    def size_of(self, i: int) -> Size | None:
        """Height and width of sample i's picture, where the index says it."""
        return self.shards[self._locate(i)[0]].size

    def start(self, name: str) -> int:
        """The number of a shard's first sample."""
        return self._starts[name]

    @cached_property
    def _starts(self) -> dict[str, int]:
        return {info.name: end - info.samples for info, end in zip(self.shards, self._ends, strict=True)}

    def key(self, i: int) -> str:
        """The key of sample i."""
        return self._row(*self._locate(i), ())[0]

    def read(self, i: int, fields: Container[str] | None = None) -> dict[str, bytes]:
        """The fields of sample i, those it has; of these only `fields` where given."""
        shard, row = self._locate(i)
        return self._data(shard, *self._row(shard, row, fields))

    def read_field(self, i: int, field: str) -> bytes:
        """One field of sample i. Raises UserError(code 3) where the sample lacks it."""
        found = self.read(i, (field,))
        if field not in found:
            raise UserError(f"{self.shards[self._locate(i)[0]].name}: sample {self.key(i)} has no {field}", code=DATA)
        return found[field]

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < self._ends[-1]:
            raise IndexError(f"sample {i} of {self._ends[-1]}")
        shard = bisect_right(self._ends, i)
        return shard, i - (self._ends[shard - 1] if shard else 0)

    def _row(self, shard: int, row: int, fields: Container[str] | None = None) -> tuple[str, dict[str, Place]]:
        _, index, layout = self._found(self.shards[shard])
        data = self._files.read(index, layout.row.size, layout.start + row * layout.row.size)
        try:
            raw, places = layout.places(data, fields)
            key = raw.decode()
            if is_safe(key):
                return key, places
            raise ValueError(key)
        except (StructError, ValueError):
            raise UserError(f"{index}: damaged", hint=reindex_hint(self.directory), code=DATA) from None

    def _data(self, shard: int, key: str, places: dict[str, Place]) -> dict[str, bytes]:
        info, tar = self.shards[shard], self._found(self.shards[shard]).tar
        if self.remote is None:
            return members(partial(self._files.read, tar), tar, info.bytes, key, places)
        return members(partial(self.remote.read, info), tar, info.bytes, key, places)


def _check(directory: Path, info: ShardInfo) -> None:
    """Raises UserError (code 3) where a local shard is missing, a link out of its folder, or of another length."""
    tar = os.path.join(directory, info.name)  # a Path for each of many thousands would take seconds
    if not os.path.isfile(tar):
        raise UserError(f"{tar}: listed in {INDEX} but not there", hint=reindex_hint(directory), code=DATA)
    if os.path.islink(tar) and leads_out(Path(tar)):
        raise UserError(f"{tar}: is a link out of its folder", hint="copy the shard itself there", code=DATA)
    if (size := os.path.getsize(tar)) != info.bytes:
        what = f"{tar}: has {size:,} bytes, its index says {info.bytes:,}"
        raise UserError(what, hint=reindex_hint(directory), code=DATA)


def _found(directory: str | Path | Remote, info: ShardInfo) -> Found:
    """A shard's offset index opened, and fetched before where it lies elsewhere. Raises UserError (code 3) where it is
    missing, damaged or of another number of samples, Unreachable."""
    tar = Path(directory) / info.name
    if isinstance(directory, Remote):
        directory.bring([index_path(tar).name])
    layout = open_index(tar)
    if layout.rows != info.samples:
        what = f"{tar}: its index lists {layout.rows} samples, {INDEX} says {info.samples}"
        raise UserError(what, hint=reindex_hint(Path(directory)), code=DATA)
    return Found(str(tar), str(index_path(tar)), layout)


def held_out_shards(folder: str | Path | Remote, *, at_least: str = "train") -> ShardSet:
    """What is held out, by one rule wherever something is measured: the val split, else the test split, else, said
    aloud, the training split. Raises UserError where that is what is left and `at_least` is "test"."""
    name = held_out_split(folder)
    if name == "test":
        note("the data has no val split: its test split is what is held out")
    if name == "train" and at_least != "train":
        raise UserError(f"{folder} has no val and no test split to measure on", hint=lacking_hint("val"), code=DATA)
    if name == "train":
        warn("the data has no val split; validation uses training images (pack with --val-fraction)")
    return ShardSet(folder, name)


def held_out_split(folder: str | Path | Remote) -> str:
    """The name of the split that `held_out_shards` takes."""
    splits = {info.split for info in read_index(folder)[1]}
    return next((s for s in ("val", "test") if s in splits), "train")


def holding_out(least: int, pictures: int) -> str:
    """The command that packs so many pictures anew with `least` of them held out, or half of all where that is fewer.

    Who is held out is drawn for each picture: two standard deviations above `least` are asked for.
    """
    share = min(0.5, math.ceil(100 * (least + 2 * math.sqrt(least)) / pictures) / 100)
    return door("make_shards pack SOURCE --output DIR", "--val-fraction", share)


def lacking_hint(split: str) -> str:
    """What mends data without a split."""
    if split == "train":
        return f"pack pictures to train on, too: {door('make_shards pack SOURCE --output DIR')}"
    if split == "val":
        return f"hold some pictures out: {door('make_shards pack SOURCE --output DIR --val-fraction 0.1')}"
    return f"give data that have a {split} split"
