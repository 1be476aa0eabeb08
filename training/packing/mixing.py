"""The samples of a split written to shards in an order drawn by seed and key, so that any few shards hold all kinds.

A training that reads shards from an address mixes a window of them at a time: were each shard a part of the source as
it lies, a window would hold a few classes alone. The order is a sort by hash, for which a file's keys alone need be
known at once: samples are laid into files by the first bits of their hash as they come, and each file is sorted and
removed in turn. The disk holds one file more than the shards themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from training.guarding import PARTIAL, disk_error
from training.progress import Progress
from training.shards.index import ShardInfo, Size
from training.shards.writing import ShardWriter

FILES = 32  # of one split that are open at once

Fields = Mapping[str, bytes]


class MixingWriter:
    """Writes one split's samples into shards in the order of a hash of (seed, key); what fits into a single shard in
    the order it came, since a shard is mixed as a whole.

    `add(key, fields)` for every sample, then `finish()` for the shards. Raises UserError (code 6) where the disk
    refuses.
    """

    def __init__(
        self, directory: Path, split: str, samples_per_shard: int, seed: int, size: Size | None = None,
        files: int = FILES,
    ) -> None:
        """`size`: that of all pictures, as `ShardWriter` takes it; `files` that samples are laid out in, which change
        nothing of their order."""
        self.shards, self.seed = ShardWriter(directory, split, samples_per_shard, size=size), seed
        self.samples = 0
        self._first: list[tuple[str, Fields]] = []  # what one shard would hold
        self._bytes = 0
        self._paths = [directory / f".{self.shards.stem}-{number:02d}{PARTIAL}" for number in range(files)]
        self._files: dict[int, BinaryIO] = {}

    def add(self, key: str, fields: Fields) -> None:
        """Takes one sample."""
        self.samples += 1
        self._first.append((key, fields))
        self._bytes += sum(map(len, fields.values()))
        shards = self.shards
        if self._files or len(self._first) > shards.samples_per_shard or self._bytes > shards.max_bytes:
            self._lay_out()

    def _lay_out(self) -> None:
        for key, fields in self._first:
            number = self._hash(key)[0] * len(self._paths) // 256
            head = json.dumps([key, [[name, len(data)] for name, data in fields.items()]]).encode()
            try:
                if number not in self._files:
                    self._files[number] = self._paths[number].open("w+b")
                self._files[number].write(b"".join([len(head).to_bytes(4, "little"), head, *fields.values()]))
            except OSError as failure:
                raise disk_error(self._paths[number], failure) from None
        self._first = []

    def _hash(self, key: str) -> bytes:
        return hashlib.blake2b(f"{self.seed}\0{key}".encode(), digest_size=16).digest()

    def finish(self) -> list[ShardInfo]:
        """Writes the shards and returns them."""
        for key, fields in self._first:
            self.shards.add(key, fields)
        with Progress("writing shards", self.samples, "sample") as progress:
            for number in sorted(self._files):
                for key, fields in self._sorted(number):
                    self.shards.add(key, fields)
                    progress.add()
                self._files.pop(number).close()
                self._paths[number].unlink()
        return self.shards.finish()

    def _sorted(self, number: int) -> Iterator[tuple[str, Fields]]:
        """The samples of a file by hash; only their places are held in memory."""
        file = self._files[number]
        try:
            file.flush()
        except OSError as failure:
            raise disk_error(self._paths[number], failure) from None
        places = sorted((self._hash(key), at) for key, at in _places(file))
        for _, at in places:
            file.seek(at)
            key, sizes = _head(file)
            yield key, {name: file.read(size) for name, size in sizes}

    def close(self) -> None:
        """Removes what lies between the source and the shards."""
        while self._files:
            number, file = self._files.popitem()
            with suppress(OSError):  # a full disk refuses what was not yet written
                file.close()
            self._paths[number].unlink(missing_ok=True)


def _head(file: BinaryIO) -> tuple[str, list[tuple[str, int]]]:
    key, sizes = json.loads(file.read(int.from_bytes(file.read(4), "little")))
    return key, sizes


def _places(file: BinaryIO) -> Iterator[tuple[str, int]]:
    """(key, place) of each sample in a file."""
    end = file.seek(0, os.SEEK_END)
    at = file.seek(0)
    while at < end:
        key, sizes = _head(file)
        yield key, at
        at = file.seek(sum(size for _, size in sizes), os.SEEK_CUR)
