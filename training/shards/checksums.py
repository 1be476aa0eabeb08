"""Checksums in the offset index, by which every read of a member tells whether the shard is still the one that was
indexed; and how much of a member is ever read.

A shard that was overwritten in place, as long as before and with the same names, is not told by its headers, and times
of files do not outlive a copy: the CRC-32 of each member is compared as it is read, which costs a part of reading.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from training.shards.tars import Index, index_dtype, index_tar

READ_LIMIT = 2**28  # bytes of a member that are read at once: a file of holes takes no disk, but memory
TEXT_LIMIT = 2**22  # of a caption or metadata
TEXTS = ("txt", "json", "caption", "text")
CHUNK = 2**20


def read_limit(field: str) -> int:
    """The bytes of a field that are read at most."""
    return TEXT_LIMIT if field in TEXTS else READ_LIMIT


def checked_dtype(key_bytes: int, fields: tuple[str, ...]) -> np.dtype[np.void]:
    """The row of an offset index with checksums: per field `offset` u8, `size` u4 and `crc` u4, all 0 where the sample
    lacks it."""
    place = [("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")]
    return np.dtype([("key", index_dtype(key_bytes, ())["key"]), *((field, place) for field in fields)])


def with_checksums(index: Index, checksum: Callable[[int, int], int]) -> Index:
    """An offset index with the checksum of the data at each (offset, size)."""
    fields = (index.dtype.names or ())[1:]
    checked: Index = np.zeros(len(index), checked_dtype(index.dtype["key"].itemsize, fields))
    checked["key"] = index["key"]
    for field in fields:
        places = [(offset, size, checksum(offset, size) if offset else 0) for offset, size in index[field].tolist()]
        checked[field] = np.array(places, checked.dtype[field])
    return checked


def index_of(tar: Path, left_out: list[str] | None = None, others: list[str] | None = None) -> Index:
    """`index_tar` with checksums, for which all of the tar is read."""
    index = index_tar(tar, left_out, others)
    with tar.open("rb") as file:

        def checksum(offset: int, size: int) -> int:
            value = 0
            file.seek(offset)
            while size > 0 and (chunk := file.read(min(size, CHUNK))):
                value = zlib.crc32(chunk, value)
                size -= len(chunk)
            return value

        return with_checksums(index, checksum)
