"""Files that are whole or absent: staged beside their target, fsynced, then renamed. Locks. Hashes of bytes.

What is asked before a file is read or written is in `training/guarding.py`, weights are in `training/tensors.py`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from training.errors import CHECKPOINT, UserError
from training.guarding import (
    PARTIAL,
    disk_error,
    make_folder,
    open_own,
    refuse_link,
    staged,
    without_waiting,
)
from training.messages import note


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` whole, synced and at once; after a crash `path` is what it was before.

    A link at `path` is replaced, not followed. Raises UserError (code 6) where the disk refuses.
    """
    partial = staged(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as failure:
        raise disk_error(path, failure) from None
    finally:
        with suppress(OSError):  # on a disk that may only be read this fails, too: the first error is the one to tell
            partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove what killed writers (`atomic_write`) left in `folder` and below. Only where no other process writes."""
    for leftover in folder.rglob(f".*{PARTIAL}"):
        leftover.unlink(missing_ok=True)


def hold(folder: Path) -> IO[str]:
    """Lock the folder for this process's life; the system frees it when the process dies, the name of the owner stays.

    An owner that ends as it should leaves no name: `Run.leave`. Raises UserError where another holds it, and where the
    lock is a link or no plain file.
    """
    file: IO[str] = open_own(folder / ".lock", "a+")  # kept open: closing it frees the lock
    owner = os.pread(file.fileno(), 80, 0).decode("utf-8", "replace").strip()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder} is in use by {owner or 'another training'}",
            hint="wait for it, or choose another --output",
            code=CHECKPOINT,
        ) from None
    if owner:
        note(f"{folder} was left by {owner}, which is no longer there; taken over")
    file.truncate(0)
    file.write(f"pid {os.getpid()} since {time.strftime('%H:%M')}")
    file.flush()
    return file


def held(folder: Path) -> bool:
    """Whether a process of this machine holds the folder; see `hold`."""
    try:
        with open(folder / ".lock", "rb", opener=without_waiting) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nothing there, or nothing that can be asked
        return False
    return False


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` through `atomic_write`."""
    with atomic_write(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8, with the folders above it."""
    make_folder(path.parent)
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of readable JSON; non-finite numbers are refused: what may hold some goes through `finite`."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file whole, into another run say. Raises UserError for a link that leads out of its folder."""
    refuse_link(source)
    with source.open("rb") as given, atomic_write(target) as file:
        shutil.copyfileobj(given, file, 1 << 20)


def finite(value: Any) -> Any:
    """Plain data as JSON has it: null for a number that is infinite or none, and as NAME_is beside it which it was."""
    if isinstance(value, Mapping):
        named = {f"{name}_is": _word(part) for name, part in value.items()}
        return {name: finite(part) for name, part in value.items()} | {k: word for k, word in named.items() if word}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if _word(value) else value


def _word(value: Any) -> Any:
    """What a number that JSON has not is called, in a list each by its place; None for all else."""
    if isinstance(value, list | tuple) and not any(isinstance(part, list | tuple) for part in value):
        words = [_word(part) for part in value]
        return words if any(words) else None
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else None


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
