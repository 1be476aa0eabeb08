"""A tar's offset index on disk: an npy file beside it, one row a sample, whose rows are read one at a time.

Nothing is mapped and nothing need stay open, so that a set of many thousand shards starts at once and takes little
memory, however many samples it has.
"""

from __future__ import annotations

import errno
import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from functools import lru_cache
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import numpy as np

from training.commands import door
from training.errors import DATA, UserError
from training.files import write_bytes
from training.guarding import leads_out
from training.shards.checksums import READ_LIMIT, checked_dtype, read_limit
from training.shards.tars import BLOCK, Index, index_dtype, stands_before

HEAD = 4096  # bytes that hold the npy header of any index of ours
SPAN = 16 << 10  # bytes; members of a sample this close are read at once, headers between them and all


def index_path(tar: Path) -> Path:
    """Where a tar's offset index lies."""
    return tar.with_suffix(".index.npy")


def write_tar_index(tar: Path, index: Index) -> None:
    """Writes a tar's offset index beside it."""
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    write_bytes(index_path(tar), buffer.getvalue())


def reindex_hint(directory: Path) -> str:
    """The hint of everything that a new index mends."""
    return f"run: {door('make_shards index', directory)}"


class Place(NamedTuple):
    """Where a member's data lie, and their CRC-32; indices of earlier versions have none."""

    offset: int
    size: int
    crc: int | None = None


class Layout(NamedTuple):
    """Where the rows of an index stand in its file, and what a row is: key, then offset and size of each field, and of
    today's indices a checksum."""

    start: int
    rows: int
    fields: tuple[str, ...]
    row: Struct
    checked: bool  # whether there are checksums

    def places(self, data: bytes, wanted: Container[str] | None = None) -> tuple[bytes, dict[str, Place]]:
        """One row as (key, field -> place), the fields that the sample has; of these only `wanted` where given."""
        numbers = self.row.unpack(data)
        width = 2 + self.checked
        places = {field: Place(*numbers[at : at + width])
                  for field, at in zip(self.fields, range(1, len(numbers), width), strict=True)
                  if numbers[at] and (wanted is None or field in wanted)}
        return numbers[0].rstrip(b"\0"), places


@lru_cache(maxsize=256)
def _layout(header: bytes) -> Layout:
    """The layout that an npy header describes; most shards of a set share one. Raises ValueError for any other array.

    Nothing but the rows of `index_dtype` is taken, so that no pickle can hide in it.
    """
    if header[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("not an npy file of version 1.0")
    file = io.BytesIO(header[8:])
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # it is read as Python source: any of a tokenizer's errors
        raise ValueError(str(error)) from None
    names = dtype.names or ()
    width = dtype[0].itemsize if names else 0
    fields = tuple(names[1:])
    checked = bool(fields) and len(dtype[1].names or ()) == 3
    if len(shape) != 1 or names[:1] != ("key",) or dtype != (checked_dtype if checked else index_dtype)(width, fields):
        raise ValueError("not an index of keys and places")
    row = Struct(f"<{width}s" + ("QII" if checked else "QI") * len(fields))
    return Layout(8 + file.tell(), shape[0], fields, row, checked)


def open_index(tar: Path) -> Layout:
    """The layout of a tar's offset index. Raises UserError(code 3) where it is missing, damaged or leads elsewhere."""
    path = index_path(tar)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            size = 10 + int.from_bytes(head[8:10], "little")
            layout = _layout((head + file.read(max(0, size - HEAD)))[:size])
            if os.fstat(file.fileno()).st_size != layout.start + layout.rows * layout.row.size:
                raise ValueError("cut")
            if leads_out(path):
                raise ValueError("a link out of its folder")
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        what = f"{path}: the shard's offset index {reason}"
        raise UserError(what, hint=reindex_hint(tar.parent), code=DATA) from None
    return layout


class Descriptors:
    """Files held open for reading, the least recently used closed first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, size: int, offset: int) -> bytes:
        """At most `size` bytes at `offset`. Raises UserError(code 3) where the file cannot be read."""
        try:
            if path in self._open:
                self._open.move_to_end(path)
            else:
                self._leave_open(self.limit - 1)
                self._open[path] = self._descriptor(path)
            return os.pread(self._open[path], size, offset)
        except OSError as error:
            what = f"{path}: cannot be read at byte {offset:,} ({error.strerror})"
            raise UserError(what, hint=f"run: {door('make_shards verify', Path(path).parent)}", code=DATA) from None

    def close(self) -> None:
        """Closes all of them."""
        self._leave_open(0)

    def _leave_open(self, count: int) -> None:
        while len(self._open) > count:
            os.close(self._open.popitem(last=False)[1])

    def _descriptor(self, path: str) -> int:
        try:
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno != errno.EMFILE or not self._open:
                raise
        self.limit = max(1, len(self._open) // 2)  # the system allows fewer, of which others need some
        self._leave_open(self.limit - 1)
        return os.open(path, os.O_RDONLY)


def members(
    read: Callable[[int, int], bytes], tar: str, end: int, key: str, places: Mapping[str, Place]
) -> dict[str, bytes]:
    """The bytes at `places` of a tar of `end` bytes, in one `read(size, offset)` where they lie together, as those of
    one sample do. Raises UserError(code 3) where they are not what the index says, and for any too large to be read."""
    contents: dict[str, bytes] = {}
    if not places:
        return contents
    for field, place in places.items():
        if place.size > read_limit(field):
            what = f"{tar}: {key}.{field} is too large ({place.size:,} bytes; at most {read_limit(field):,} are read)"
            raise UserError(what, hint="leave it out of the tar", code=DATA)
    low = min(place.offset for place in places.values()) - BLOCK
    high = max(place.offset + place.size for place in places.values())
    contiguous = high - low <= min(READ_LIMIT, SPAN + 2 * sum(place.size for place in places.values()))
    block = read(high - low, low) if contiguous and 0 <= low < high <= end else b""
    for field, (offset, size, crc) in places.items():
        if not contiguous:
            low = offset - BLOCK
            block = read(BLOCK + size, low) if low >= 0 and offset + size <= end else b""
        data = block[offset - low : offset - low + size]
        if len(data) != size or low < 0:
            what = f"{tar}: damaged at byte {offset:,} ({key}.{field}): unexpected end of data"
            raise UserError(what, hint=f"run: {door('make_shards verify', Path(tar).parent)}", code=DATA)
        if not stands_before(block[offset - low - BLOCK : offset - low], f"{key}.{field}", size):
            what = f"{tar}: {key}.{field} is not where its index says; the shard was changed after indexing"
            raise UserError(what, hint=reindex_hint(Path(tar).parent), code=DATA)
        if crc is not None and zlib.crc32(data) != crc:
            what = f"{tar}: {key}.{field} has other bytes than were indexed; the shard was changed or is damaged"
            raise UserError(what, hint=f"run: {door('make_shards verify', Path(tar).parent)}", code=DATA)
        contents[field] = data
    return contents
