"""Files under relative names, wherever they lie: in a folder, or in an archive that is read in place."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from pathlib import Path

from training.errors import UserError
from training.messages import printable
from training.packing.sources import Remark, Stored
from training.pictures.decoding import LARGEST_FILE, read_file, refuse
from training.shards.index import PACKING

HEAD = 32  # bytes that tell what a file is


class Tree(ABC):
    """`files`: size by name (`a/b.png`), in order of names; `passed`: remarks on what is not among them."""

    name: str
    files: dict[str, int]
    passed: list[Remark]
    root: Path | None = None  # of a folder

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """A file's bytes. Raises UserError(code 3) where they cannot be had or are more than `limit`."""

    def picture(self, name: str) -> bytes | Stored:
        """A picture's file, or where others than this process can read it, too. Raises as `read`."""
        return self.read(name, LARGEST_FILE)

    @abstractmethod
    def state(self) -> str:
        """A hash that changes when a file does."""

    @abstractmethod
    def head(self, name: str) -> bytes:
        """A file's first HEAD bytes; none where they cannot be had."""

    def text(self, name: str, limit: int) -> bytes:
        """As `read`, of a file whose words are going to be shown."""
        return self.read(name, limit)


def is_hidden(name: str) -> bool:
    """Whether a part of the name begins with a dot, as debris of other systems does (`._a.jpg`, `.DS_Store`)."""
    return any(part.startswith(".") for part in name.split("/"))


class Directory(Tree):
    """A folder on disk, with the folders below it. Links to folders are followed, each real folder read once; hidden
    files and folders that hold shards of ours are passed over."""

    root: Path

    def __init__(self, root: Path) -> None:
        self.name, self.root, self.passed = str(root), root, []
        self._real = root.resolve()
        self._seen: set[tuple[int, int]] = set()
        found: list[Path] = []
        waiting = [root]
        while waiting:  # real folders first: the names they have there are theirs
            links: list[Path] = []
            for top in waiting:
                found += self._below(top, links)
            waiting = sorted(links)
        names = sorted((path.relative_to(root).as_posix(), path) for path in found)
        self.files = {name: path.lstat().st_size for name, path in names}
        self._paths = dict(names)
        self.passed.sort(key=lambda remark: remark.key)  # a folder's own order differs between disks

    def _below(self, top: Path, links: list[Path]) -> list[Path]:
        """The files below a folder; the linked folders among them go to `links`."""
        found: list[Path] = []
        if top.is_symlink() and self._real.is_relative_to(top.resolve()):
            return self._pass(top, "link to a folder that is read already")
        for place, folders, names in os.walk(top, True, self._unreadable):
            status, folder = os.stat(place), Path(place)
            if (status.st_dev, status.st_ino) in self._seen:
                self._pass(folder, "link to a folder that is read already")
                folders.clear()
                continue
            self._seen.add((status.st_dev, status.st_ino))
            if PACKING in names and folder != self.root:
                self._pass(folder, "folder of packed shards")
                folders.clear()
                continue
            for name in [name for name in (*folders, *names) if name.startswith(".")]:
                self._pass(folder / name, "hidden file or folder")
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links += [folder / name for name in folders if (folder / name).is_symlink()]
            found += [folder / name for name in names if not name.startswith(".")]
        return found

    def _pass(self, path: Path, why: str) -> list[Path]:
        self.passed.append(Remark(printable(path.relative_to(self.root).as_posix()), why, "ignored"))
        return []

    def _unreadable(self, error: OSError) -> None:
        self.passed.append(Remark(printable(error.filename), f"folder that cannot be read ({error.strerror})"))

    def read(self, name: str, limit: int) -> bytes:
        """A regular file's bytes; a picture may be a link to anywhere."""
        return read_file(self._paths[name], limit)

    def picture(self, name: str) -> Stored:
        """Where it lies."""
        return Stored(self._paths[name].absolute())

    def head(self, name: str) -> bytes:
        """The first bytes of a regular file."""
        try:
            if not self._paths[name].is_file():  # to open a pipe would wait for its writer
                return b""
            with self._paths[name].open("rb") as file:
                return file.read(HEAD)
        except OSError:
            return b""

    def text(self, name: str, limit: int) -> bytes:
        """As `read`, but no link out of the folder: the words of a private file must not become captions."""
        path = self._paths[name]
        if path.is_symlink():
            real = path.resolve()
            if not real.is_relative_to(self._real) and not real.is_relative_to(path.parent.resolve()):
                raise refuse("text file that is a link out of its folder")
        return self.read(name, limit)

    def state(self) -> str:
        """A hash of names, sizes and times of all files."""
        digest = hashlib.sha256()
        for name, path in self._paths.items():
            stat = path.lstat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "replace"))
        return digest.hexdigest()


def file_state(path: Path) -> str:
    """A hash of one file's name, size and time."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be opened: {error.strerror}") from None
    return hashlib.sha256(repr((path.name, status.st_size, status.st_mtime_ns)).encode("utf-8", "replace")).hexdigest()
