"""Archives read where they lie: zip, and tar under gzip, bzip2 or xz. Nothing is unpacked to disk, and nothing is read
beyond a cap."""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from training.errors import DATA, UserError
from training.messages import printable
from training.packing.sources import Remark, Stored
from training.packing.texts import LARGEST_TEXT, TEXTS
from training.packing.trees import HEAD, Tree, file_state, is_hidden
from training.pictures.decoding import LARGEST_FILE, SUFFIXES, refuse
from training.shards.opened import Bytes, Opened
from training.shards.tars import Member, is_safe

# How a compressed tar is opened, by the first bytes of the file.
OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
TAR_NAMES = (".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz")
CHUNK = 1 << 20
RATIO = 250  # that a compressed file may unpack to, and a little more: pictures hardly shrink, bombs a thousandfold
SLACK = 64 << 20  # bytes
MOST_TEXT = 1 << 30  # bytes of captions kept while a compressed tar is read
MOST_MEMBERS = 10_000_000  # of a zip
FAILURES = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, RuntimeError)


class Unpacked:
    """The bytes of a compressed file by offset. To go back is to unpack from the start again, so read forwards.

    Raises UserError(code 3) where it is damaged or unpacks to far more than it has itself.
    """

    def __init__(self, path: Path, opener: Callable[[Path], IO[bytes]]) -> None:
        self.path, self.end = path, 0
        self._kept: dict[tuple[int, int], bytes] = {}
        most = path.stat().st_size * RATIO + SLACK
        self._file: IO[bytes] = opener(path)
        while size := len(self.read(CHUNK, self.end)):
            self.end += size
            if self.end > most:
                self.close()
                what = f"{path}: unpacks to more than {most:,} bytes, {RATIO} times its own size and more"
                raise UserError(what, hint="unpack it yourself where you trust it, and pack the folder", code=DATA)

    def keep(self, members: list[Member]) -> None:
        """Remembers what is read beside the pictures, so that these alone are gone through in their order."""
        total = 0
        for name, offset, size in members:
            suffix = Path(name).suffix.lower()
            if suffix not in SUFFIXES:
                whole = suffix in (*TEXTS, ".json") and size <= LARGEST_TEXT
                places = {(min(size, HEAD), offset), (size if whole else 0, offset)}
                self._kept |= {(length, at): self.read(length, at) for length, at in sorted(places) if length}
                total += size if whole else HEAD
            if total > MOST_TEXT:
                what = f"{self.path}: holds more than {MOST_TEXT:,} bytes of captions"
                raise UserError(what, hint="unpack it and pack the folder", code=DATA)

    def read(self, size: int, at: int) -> bytes:
        """Up to `size` bytes at `at`; fewer only at the end."""
        if (size, at) in self._kept:
            return self._kept[size, at]
        try:
            if self._file.tell() != at:
                self._file.seek(at)
            return self._file.read(size)
        except FAILURES as error:
            self.close()
            raise UserError(f"{self.path}: damaged ({error})", hint="fetch it again", code=DATA) from None

    def close(self) -> None:
        """Nothing is read after it."""
        self._file.close()


def open_tar(path: Path) -> Bytes:
    """A tar's bytes, unpacked where they are compressed."""
    plain = Opened(path)
    head = plain.read(6, 0)
    opener = next((opener for mark, opener in OPENERS.items() if head.startswith(mark)), None)
    if opener is None:
        return plain
    plain.close()
    return Unpacked(path, opener)


def stored(path: Path, data: Bytes, offset: int, size: int, name: str = "file") -> bytes | Stored:
    """A picture of a tar: where it lies, or its bytes where the tar is compressed. Raises UserError(code 3) beyond
    LARGEST_FILE."""
    if size > LARGEST_FILE:
        raise refuse(f"{name} too large ({size:,} bytes; at most {LARGEST_FILE:,} are read)")
    return Stored(path.absolute(), offset, size) if isinstance(data, Opened) else data.read(size, offset)


class Tar(Tree):
    """The members of a tar as the folder that was put into it."""

    def __init__(self, path: Path, members: list[Member], data: Bytes) -> None:
        self.name, self.path, self._data, self.passed = str(path), path, data, []
        self._places = {member.name: member for member in members if not is_hidden(member.name)}
        self.files = {name: member.size for name, member in self._places.items()}  # in the order they are read best
        if hidden := [member.name for member in members if is_hidden(member.name)]:
            self.passed = [Remark(hidden[0], "hidden file or folder", "ignored", len(hidden))]

    def read(self, name: str, limit: int) -> bytes:
        """A member's bytes."""
        member = self._places[name]
        if member.size > limit:
            raise refuse(f"file too large ({member.size:,} bytes; at most {limit:,} are read)")
        return self._data.read(member.size, member.offset)

    def picture(self, name: str) -> bytes | Stored:
        """Where it lies in a tar that is not compressed."""
        return stored(self.path, self._data, self._places[name].offset, self._places[name].size)

    def head(self, name: str) -> bytes:
        """A member's first bytes."""
        return self._data.read(min(self._places[name].size, HEAD), self._places[name].offset)

    def state(self) -> str:
        """That of the file."""
        return file_state(self.path)


class Zip(Tree):
    """The members of a zip. Encrypted and unsafe ones and links are left out, with a remark."""

    def __init__(self, path: Path) -> None:
        self.name, self.path, self.files, self.passed = str(path), path, {}, []
        try:
            self._zip = zipfile.ZipFile(path)
        except (*FAILURES, ValueError) as error:
            raise UserError(f"{path}: is not a sound zip archive ({error})", hint="fetch it again", code=DATA) from None
        members = self._zip.infolist()
        if len(members) > MOST_MEMBERS:
            raise UserError(f"{path}: more than {MOST_MEMBERS:,} members", hint="pack parts of it", code=DATA)
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            if not member.is_dir():
                self._take(member)
        self._members = dict(sorted(self._members.items()))
        self.files = {name: member.file_size for name, member in self._members.items()}

    def _take(self, member: zipfile.ZipInfo) -> None:
        name = member.filename.replace("\\", "/").removeprefix("./")
        if is_hidden(name) and ".." not in name.split("/"):
            self.passed.append(Remark(printable(name), "hidden file or folder", "ignored"))
        elif stat.S_ISLNK(member.external_attr >> 16):
            self.passed.append(Remark(printable(name), "unusable member (a link)"))
        elif not is_safe(name):
            self.passed.append(Remark(printable(name), "unusable member (its name leaves the folder or is not shown)"))
        elif member.flag_bits & 1:
            self.passed.append(Remark(name, "unusable member (encrypted)"))
        elif name in self._members:
            self.passed.append(Remark(name, "unusable member (a second of this name)"))
        else:
            self._members[name] = member

    def read(self, name: str, limit: int) -> bytes:
        """A member's bytes, checked by its CRC; what its header says of its size is not believed."""
        member = self._members[name]
        if member.file_size > limit:
            raise refuse(f"file too large ({member.file_size:,} bytes; at most {limit:,} are read)")
        if member.file_size > member.compress_size * RATIO + SLACK:
            raise refuse(f"file too large ({member.file_size:,} bytes out of {member.compress_size:,})")
        try:
            with self._zip.open(member) as file:
                data = file.read(limit + 1)
        except (*FAILURES, ValueError) as error:
            raise refuse(f"damaged member ({error})") from None
        if len(data) > limit:
            raise refuse(f"file too large (more than {limit:,} bytes)")
        return data

    def head(self, name: str) -> bytes:
        """A member's first bytes."""
        try:
            with self._zip.open(self._members[name]) as file:
                return file.read(HEAD)
        except (*FAILURES, ValueError):
            return b""

    def state(self) -> str:
        """That of the file."""
        return file_state(self.path)
