"""Writing shards: tar and offsets beside it, whole or not at all."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from training.errors import UserError
from training.files import atomic_write, file_sha256
from training.shards.checksums import index_of, with_checksums
from training.shards.index import ShardInfo, Size
from training.shards.offset_index import index_path, open_index, write_tar_index
from training.shards.tars import END, NAME, index_tar, is_safe, make_index, member_bytes


def write_shard(
    directory: Path,
    name: str,
    samples: Iterable[tuple[str, Mapping[str, bytes]]],
    split: str | None = None,
    size: Size | None = None,
) -> ShardInfo:
    """Writes `DIR/NAME.tar` and its index; NAME is `SPLIT-NUMBER`, such as `train-000000`, unless `split` is given;
    `size`: that of all its pictures, to be told. The same samples give the same bytes.

    Raises ValueError for a key or field that webdataset would not read back, a key given twice, or no samples at all.
    """
    tar = directory / f"{name}.tar"
    places: dict[str, dict[str, tuple[int, int]]] = {}
    checksums: dict[int, int] = {}  # by offset
    digest, at = hashlib.sha256(), 0
    with atomic_write(tar) as file:
        for key, fields in samples:
            if key in places or not fields:
                raise ValueError(f"{tar.name}: sample {key!r} " + ("is given twice" if fields else "has no fields"))
            places[key] = {}
            for field in sorted(fields):
                match = NAME.fullmatch(f"{key}.{field}")
                if not match or match[1] != key or field != field.lower() or not is_safe(key):
                    raise ValueError(f"{tar.name}: {key!r} with field {field!r} does not make a webdataset name")
                block = member_bytes(f"{key}.{field}", fields[field])
                length = len(fields[field])
                offset = at + len(block) - length - -length % 512
                places[key][field], checksums[offset] = (offset, length), zlib.crc32(fields[field])
                digest.update(block)
                at += file.write(block)
        digest.update(END)
        at += file.write(END)
        if not places:
            raise ValueError(f"{tar.name}: a shard needs at least one sample")
        write_tar_index(tar, with_checksums(make_index(places), lambda offset, _: checksums[offset]))
    return ShardInfo(tar.name, split or name.rpartition("-")[0], len(places), at, digest.hexdigest(), size)


def sound_shard(
    directory: Path, name: str, split: str | None = None, size: Size | None = None
) -> ShardInfo | None:
    """The finished shard `NAME` (as `write_shard` names it) if tar and index are there and agree; None where it must be
    written (again)."""
    tar = directory / f"{name}.tar"
    try:
        checked = open_index(tar).checked
        index = np.load(index_path(tar), allow_pickle=False)
        if not np.array_equal(index, index_of(tar) if checked else index_tar(tar)):
            return None
    except (OSError, UserError):
        return None
    split = split or name.rpartition("-")[0]
    return ShardInfo(tar.name, split, len(index), tar.stat().st_size, file_sha256(tar), size)


class ShardWriter:
    """Writes one split's samples into numbered shards of `samples_per_shard`, or fewer where `max_bytes` of data are
    reached first. Where they are all of one `size`, names and index say so.

    `add(key, fields)` for every sample, then `finish()` for the split's shards, to hand to `write_index`.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        samples_per_shard: int = 2000,
        max_bytes: int = 2**28,
        size: Size | None = None,
    ) -> None:
        if samples_per_shard < 1 or max_bytes < 1:
            raise ValueError("samples_per_shard and max_bytes must be at least 1")
        self.directory, self.split, self.size = directory, split, size
        self.stem = f"{split}-{size[0]}x{size[1]}" if size else split
        self.samples_per_shard, self.max_bytes = samples_per_shard, max_bytes
        self.infos: list[ShardInfo] = []
        self._waiting: list[tuple[str, Mapping[str, bytes]]] = []
        self._bytes = 0

    def add(self, key: str, fields: Mapping[str, bytes]) -> None:
        """Takes one sample; writes a shard whenever one is full."""
        self._waiting.append((key, fields))
        self._bytes += sum(map(len, fields.values()))
        if len(self._waiting) >= self.samples_per_shard or self._bytes >= self.max_bytes:
            self._write()

    def finish(self) -> list[ShardInfo]:
        """Writes what is left and returns all shards of the split."""
        if self._waiting:
            self._write()
        return self.infos

    def _write(self) -> None:
        name = f"{self.stem}-{len(self.infos):06d}"
        self.infos.append(write_shard(self.directory, name, self._waiting, self.split, self.size))
        self._waiting, self._bytes = [], 0
