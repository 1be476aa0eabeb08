"""Tar archives as we write them (fixed bytes for fixed input) and as we read them: headers walked strictly, nothing
ever extracted.

Python's tarfile stops silently at a damaged header, so an archive that was cut reads as a shorter one. Here every fault
is an error that names the byte and the member.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from tarfile import PAX_FORMAT, TarInfo
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.errors import DATA, UserError
from training.shards.opened import Bytes, Opened

BLOCK = 512
END = bytes(2 * BLOCK)
MEMBER_LIMIT = 2**31  # bytes; an image or a latent is never larger, a forged header may claim to be
LONGEST_NAME = 1024  # bytes
MOST_FIELDS = 64  # of one tar; names full of dots would make a field of each, and an index without end
KINDS = {  # what is neither a file nor a folder
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
# webdataset's rule: key up to the first dot of the file's name, then the field
NAME = re.compile(r"((?:[^/]+/)*[^./][^./]*)\.([^/]+)")

# One row a sample: `key` bytes, then per field (`offset` u8, `size` u4); offset 0 = the sample lacks the field.
Index = NDArray[np.void]


class Member(NamedTuple):
    """A regular file in a tar: its data are the `size` bytes at `offset`."""

    name: str
    offset: int
    size: int


def member_bytes(name: str, data: bytes) -> bytes:
    """Header, data and padding of one member; the same bytes for the same input, always."""
    info = TarInfo(name)
    info.size = len(data)  # mtime, uid and gid are 0 and the mode 0644 by default
    return info.tobuf(PAX_FORMAT) + data + bytes(-len(data) % BLOCK)


def index_dtype(key_bytes: int, fields: tuple[str, ...]) -> np.dtype[np.void]:
    """The row of an offset index."""
    place = [("offset", "<u8"), ("size", "<u4")]
    return np.dtype([("key", f"S{max(1, key_bytes)}"), *((field, place) for field in fields)])


def make_index(samples: dict[str, dict[str, tuple[int, int]]]) -> Index:
    """The offset index of samples given as key -> field -> (offset, size), in their order; fields sorted."""
    fields = tuple(sorted({field for places in samples.values() for field in places}))
    rows = [(key.encode(), *(places.get(field, (0, 0)) for field in fields)) for key, places in samples.items()]
    index: Index = np.array(rows, dtype=index_dtype(max((len(row[0]) for row in rows), default=1), fields))
    return index


def _number(field: bytes) -> int:
    """A header's number: octal text, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b"\0 ") or b"0", 8)


def _pax(data: bytes) -> dict[str, bytes]:
    """The records `LENGTH KEY=VALUE\\n` of an extended header."""
    records: dict[str, bytes] = {}
    while data.strip(b"\0"):
        length = int(data.split(b" ", 1)[0])
        key, _, value = data[:length].split(b" ", 1)[1].partition(b"=")
        if length < 5 or length > len(data) or not value.endswith(b"\n"):
            raise ValueError("bad extended header")
        records[key.decode()] = value[:-1]
        data = data[length:]
    return records


class _Walk:
    """The state of one strict walk over a tar's headers."""

    def __init__(self, path: Path, data: Bytes) -> None:
        self.path, self.read, self.end = path, data.read, data.end
        self.at, self.link = 0, b""  # the byte it stands at; where the present member is a link to

    def refuse(self, why: str, name: str = "") -> UserError:
        """The error of damage at the present byte, in the member `name` where it is known."""
        name = "".join(letter if letter.isprintable() else "?" for letter in name)  # no escapes to a terminal
        where = f" (member {name})" if name else ""
        return UserError(
            f"{self.path}: damaged at byte {self.at:,}{where}: {why}", hint="fetch or pack this shard again", code=DATA
        )

    def unsafe(self, name: bytes, why: str) -> UserError:
        """The error of a whole member that must not be used, `name` as it is in the header."""
        shown = name[:80].decode(errors="backslashreplace")
        return UserError(
            f"{self.path}: unsafe member {shown!r}: {why}", hint="make the tar again without this member", code=DATA
        )

    def start(self) -> None:
        """Refuses what is no tar at all, saying what it looks like."""
        head = self.read(BLOCK, 0)
        if not head:
            raise UserError(f"{self.path}: is empty", hint="fetch or pack this shard again", code=DATA)
        if not any(head):
            raise UserError(f"{self.path}: is empty (only zeros)", hint="fetch or pack this shard again", code=DATA)
        if head[257:262] != b"ustar" and not self._sound(head):
            kind = "gzip data" if head[:2] == b"\x1f\x8b" else repr(head[:16].decode("latin-1"))[1:-1]
            kind = f'starts with "{kind}"' if kind != "gzip data" else "it is gzip data"
            hint = (
                "gunzip it first: shards are read by offset" if "gzip" in kind else "check where this file came from"
            )
            raise UserError(f"{self.path}: is not a tar archive ({kind})", hint=hint, code=DATA)

    @staticmethod
    def _sound(header: bytes) -> bool:
        if len(header) < BLOCK:
            return False
        try:
            return _number(header[148:156]) == sum(header[:148]) + 256 + sum(header[156:])
        except ValueError:
            return False

    def data(self, size: int, name: str) -> bytes:
        """The data of a small extension member after the header at `at`."""
        if size > 64 * LONGEST_NAME:
            raise self.refuse(f"an extended header of {size:,} bytes", name)
        data = self.read(size, self.at + BLOCK)
        if len(data) < size:
            raise self.refuse("unexpected end of data", name)
        return data

    def close(self) -> None:
        """At the first zero block: the rest must be zeros too."""
        while chunk := self.read(1 << 20, self.at):
            if any(chunk):
                raise self.refuse("a zero block in the middle; data follow it")
            self.at += len(chunk)

    def members(self) -> Iterator[tuple[bytes, bytes, int, int]]:
        """(raw name, kind, offset, size) of everything but folders; checks that it lies within the file."""
        long_name, long_link, long_size = b"", b"", -1
        while header := self.read(BLOCK, self.at):
            if len(header) == BLOCK and not any(header):  # the mark of the end, of which a cut archive has none
                return self.close()
            label = header[:100].split(b"\0")[0].decode(errors="replace")
            if not self._sound(header):
                raise self.refuse(
                    "cut inside a header" if len(header) < BLOCK else "bad header checksum", label if self.at else ""
                )
            kind, size = header[156:157], self._size(header, label)
            if kind in b"xLK" and kind != b"":  # an extension: its name and size are those of the member after it
                try:
                    data, field = self.data(size, label), "path" if kind == b"L" else "linkpath"
                    records = _pax(data) if kind == b"x" else {field: data.rstrip(b"\0")}
                    long_name, long_link = records.get("path", long_name), records.get("linkpath", long_link)
                    long_size = self._limited(int(records["size"]), label) if "size" in records else long_size
                except (ValueError, IndexError):
                    raise self.refuse("bad extended header", label) from None
            elif kind != b"g":  # a global header says nothing we need
                name = long_name or self._name(header)
                size = long_size if long_size >= 0 else size
                self.link = long_link or header[157:257].split(b"\0")[0]
                long_name, long_link, long_size = b"", b"", -1
                if self.at + BLOCK + size > self.end:  # asked of the file's size: reading it all would be slow
                    raise self.refuse("unexpected end of data", name.decode(errors="replace"))
                if kind != b"5":
                    yield name, kind, self.at + BLOCK, size
            self.at += BLOCK + size + -size % BLOCK  # data are padded to whole blocks
        raise self.refuse("the file ends without the end-of-archive mark; it was cut between two members")

    @staticmethod
    def _name(header: bytes) -> bytes:
        name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
        return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name

    def _size(self, header: bytes, label: str) -> int:
        try:
            size = _number(header[124:136])
        except ValueError:
            raise self.refuse("bad size", label) from None
        return self._limited(size, label)

    def _limited(self, size: int, label: str) -> int:
        if not 0 <= size <= MEMBER_LIMIT:  # a negative one would walk backwards, for ever
            raise self.refuse(f"the member claims {size:,} bytes; at most {MEMBER_LIMIT:,} are read", label)
        return size


def walk_tar(
    path: str | Path, left_out: list[str] | None = None, data: Bytes | None = None, hard_links: bool = False
) -> Iterator[Member]:
    """The regular files of a tar in order, directories left out. Nothing is extracted, no link leads out of the tar.

    Raises UserError(code 3) for anything but a sound tar: cut or damaged headers and data, a missing end mark, links,
    devices, names that are absolute, hold `..` or control characters, or are not UTF-8. Where `left_out` is given,
    members that are unsafe are described there instead, and passed over. `data`: the tar's bytes, where they are not
    the file's own; it stays open. `hard_links` to a member before them have that member's data.
    """
    path = Path(path)
    with closing(Opened(path)) if data is None else nullcontext(data) as opened:
        walk = _Walk(path, opened)
        walk.start()
        places: dict[bytes, tuple[int, int]] = {}
        for raw, kind, offset, size in walk.members():
            if hard_links and kind == b"1" and walk.link in places:
                kind, (offset, size) = b"0", places[walk.link]
            try:
                member = Member(_safe_name(walk, raw, kind), offset, size)
            except UserError as error:
                if left_out is None:
                    raise
                left_out.append(error.what.removeprefix(f"{path}: "))
            else:
                if hard_links:
                    places[raw] = offset, size
                yield member


def is_safe(name: str) -> bool:
    """Whether a member's name stays inside the folder and can be shown."""
    return bool(name) and name.isprintable() and "\\" not in name and name[0] != "/" and ".." not in name.split("/")


def _safe_name(walk: _Walk, raw: bytes, kind: bytes) -> str:
    if kind not in (b"0", b"\0"):
        raise walk.unsafe(raw, f"it is {KINDS.get(kind, f'of unknown type {kind!r}')}")
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise walk.unsafe(raw, "its name is not UTF-8") from None
    name = name.removeprefix("./")
    if len(raw) > LONGEST_NAME:
        raise walk.unsafe(raw, f"its name has {len(raw)} bytes; at most {LONGEST_NAME} are read")
    if not is_safe(name):
        raise walk.unsafe(raw, "its name is absolute, leaves the folder or holds control characters")
    return name


def stands_before(header: bytes, name: str, size: int) -> bool:
    """Whether a member's header block is that of `name` with `size` bytes: cheap, so asked at every read.

    Long and foreign names are told by their size alone, for they stand in an extended header.
    """
    if header.startswith(f"{name}\0".encode()) and header[124:136] == b"%011o\0" % size:
        return True  # as most programs write it
    try:
        header_size = _number(header[124:136])
    except (ValueError, IndexError):
        return False
    header_name = header[:100].split(b"\0", 1)[0].removeprefix(b"./").lower()
    comparable = name.isascii() and len(name) < 98
    return header_size == size and (not comparable or name.lower().encode().endswith(header_name))


def index_tar(path: str | Path, left_out: list[str] | None = None, others: list[str] | None = None) -> Index:
    """The offset index of any webdataset tar, grouped by key in order of first appearance.

    Files without a field (no dot, or hidden such as `._a.jpg`) belong to no sample, as in webdataset, and are passed
    over, named in `others` where it is given. Raises UserError(code 3) as `walk_tar` does, and for a field given twice
    or a tar without samples; where `left_out` is given, single members that cannot be used are described there instead.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    fields: set[str] = set()
    for name, offset, size in walk_tar(path, left_out):
        if not (match := NAME.fullmatch(name)):
            if others is not None:
                others.append(name)
            continue
        key, field = match[1], match[2].lower()
        # Members of a sample need not stand together; `key` is the index's own column, and no field may take its name.
        if field != "key" and field not in samples.setdefault(key, {}):
            samples[key][field] = (offset, size)
            fields.add(field)
            if len(fields) > MOST_FIELDS:
                what = f"{path}: more than {MOST_FIELDS} fields ({', '.join(sorted(fields)[:4])}, …)"
                raise UserError(what, hint="a key ends at the first dot of the file's name: KEY.jpg", code=DATA)
            continue
        why = f"duplicate sample key {key} ({field} twice)" if field != "key" else f"sample {key} has a field 'key'"
        if left_out is None:
            raise UserError(f"{path}: {why}", hint="every sample needs a key of its own", code=DATA)
        left_out.append(why)
    if not samples:
        raise UserError(f"{path}: no samples in this tar (files named KEY.FIELD such as 000001.jpg)", code=DATA)
    return make_index(samples)
