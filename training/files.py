"""Files that are whole or absent: staged beside their target, fsynced, then renamed. Content hashes of weights."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from training.commands import door
from training.errors import CHECKPOINT, DATA, DISK, UserError
from training.messages import note

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial"  # how the names of staged files end
LARGEST_HEADER = 8 << 20  # bytes: some 80,000 tensors; the format allows more, which only a forged file uses
PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zip archives of torch.save, and bare pickles


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` whole, synced and at once; after a crash `path` is what it was before.

    Raises UserError (code 6) where the disk refuses.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
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
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove what killed writers (`atomic_write`) left in `folder` and below. Only where no other process writes."""
    for leftover in folder.rglob(f".*{PARTIAL}"):
        leftover.unlink(missing_ok=True)


def hold(folder: Path) -> IO[str]:
    """Lock the folder for this process's life; the system frees it when the process dies, the name of the owner stays.

    An owner that ends as it should leaves no name: `Run.leave`. Raises UserError where another holds it.
    """
    file = (folder / ".lock").open("a+", encoding="utf-8")  # kept open: closing it frees the lock
    file.seek(0)
    owner = file.read().strip()[:80]
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


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` through `atomic_write`."""
    with atomic_write(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of readable JSON; non-finite numbers are refused."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path, *, code: int = CHECKPOINT) -> Any:
    """Parse a JSON file. Raises UserError where it is missing or damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", hint="is this the right folder?", code=code) from None
    except (OSError, ValueError, RecursionError) as failure:
        reason = f"{path}: not readable as JSON ({failure})"
        raise UserError(reason, hint="the file is damaged; use another copy", code=code) from None


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_error(path: Path, failure: Exception) -> UserError:
    """What went wrong while writing `path`, as a sentence."""
    wrapped = re.search(r"\(os error (\d+)\)", str(failure))  # as safetensors tells it
    number = int(wrapped[1]) if wrapped else getattr(failure, "errno", None)
    reason = f"cannot write {path}: {os.strerror(number) if number else failure}"
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(reason, hint="choose another --output, or check the folder's permissions", code=DISK)
    free = shutil.disk_usage(_standing(path)).free
    reason = f"{reason} ({gigabytes(free)} free)"
    return UserError(reason, hint="free disk space, or choose another --output", code=DISK)


def gigabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"


def _standing(path: Path) -> Path:
    """The nearest folder above `path` (or itself) that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def check_output(folder: Path, size: int = 0) -> None:
    """Raises UserError (code 6) where `folder` cannot become a folder to write `size` bytes in. Creates nothing."""
    place = _standing(folder)
    if not place.is_dir():
        raise UserError(f"{place} is not a folder", hint="choose another --output", code=DISK)
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place} cannot be written to", hint="choose another --output", code=DISK)
    if size > (free := shutil.disk_usage(place).free):
        reason = f"{folder}: needs {gigabytes(size)}, {gigabytes(free)} free"
        raise UserError(reason, hint="free disk space, or choose another --output", code=DISK)


def make_folder(folder: Path) -> None:
    """Create a folder to write in, parents too. Raises UserError (code 6) where that cannot be."""
    check_output(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise disk_error(folder, failure) from None


def leads_out(path: Path) -> bool:
    """Whether `path` is a symbolic link out of its folder: an index names files of its own folder alone."""
    return path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve())


def no_index(folder: Path) -> UserError:
    """What is wrong with a folder of shards that has no index.json."""
    why = "holds no index.json" if folder.is_dir() else "is not a folder"
    pack, index = door("make_shards pack SOURCE --output", folder), door("make_shards index", folder)
    hint = f"pack pictures: {pack}; or index the tars that lie there: {index}"
    return UserError(f"{folder} {why}", hint=hint, code=DATA)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file and fsync it (staging is the caller's: checkpoints rename a whole folder)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        save_file(contiguous, path, metadata=dict(metadata or {"format": "pt"}))  # one key: the order of several varies
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as failure:  # safetensors wraps the system's own error
        raise disk_error(path, failure) from None


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file. Raises UserError for anything else, pickles by content included; never unpickles."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_safetensors(path)
    try:
        return dict(load_file(path, device=device))
    except (SafetensorError, OSError, ValueError) as failure:
        reason = f"{path}: damaged safetensors file ({failure})"
        raise UserError(reason, hint="use another checkpoint or download it again", code=CHECKPOINT) from None


def check_safetensors(path: Path) -> None:
    """Raises UserError where `path` is missing, a pickle, or does not begin as a safetensors file must."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            fits = 2 <= size <= min(LARGEST_HEADER, os.fstat(file.fileno()).st_size - 8)
            header = file.read(size) if fits else b""
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", hint="is this the right folder?", code=CHECKPOINT) from None
    except OSError as failure:
        reason = f"{path}: cannot be read ({failure.strerror})"
        raise UserError(reason, hint="is this the right file?", code=CHECKPOINT) from None
    if head.startswith(PICKLES) and not fits:  # a header of 640 bytes begins as a pickle does
        reason = f"{path}: refusing to load a pickle file; only safetensors is read"
        raise UserError(reason, hint="convert it to safetensors where you trust its source", code=CHECKPOINT)
    try:
        if not fits:
            raise ValueError(f"header of {size:,} bytes")
        json.loads(header, object_pairs_hook=_once)
    except (ValueError, RecursionError) as failure:
        reason = f"{path}: not a safetensors file ({failure})"
        raise UserError(reason, hint="is the file complete?", code=CHECKPOINT) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, none of its names given twice: readers would disagree on which of the two counts."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r:.80} is given twice")
        values[name] = value
    return values


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes in order of name: the identity of weights, however stored."""
    import torch

    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
