"""What every reader and writer of files asks first: does a link lead out, is it too large, is the place free?

The rule for links: a folder that the user names may be a link, or lie behind one. Inside it nothing that is read,
written, copied or removed is reached through a link that leads out of it. The one exception is a checkpoint kept
elsewhere (`RUN/checkpoints/step-…` a link): it is read, checked against its manifest, and never written or deleted.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from training.commands import door
from training.errors import CHECKPOINT, DATA, DISK, USAGE, UserError

PACKED = ("*.tar", "packing.json")  # what lies in a folder of shards, finished or not
PARTIAL = ".partial"  # how the names of staged files end
LARGEST_JSON = 16 << 20  # bytes of a file of JSON or text that is read whole; ours are far smaller
KEPT_ELSEWHERE = re.compile(r"(.*/)?checkpoints/step-\d{8,}")
CALLED = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number",
          float: "a number", type(None): "null"}  # fmt: skip


def leads_out(path: Path, home: Path | None = None) -> bool:
    """Whether `path`, or a folder on the way to it from `home` (its own folder), is a symbolic link out of `home`."""
    if home is None and not path.is_symlink():
        return False
    inside = os.path.realpath(path.parent if home is None else home)
    return not Path(os.path.realpath(path)).is_relative_to(inside)


def refuse_links(folder: Path, code: int = CHECKPOINT) -> None:
    """Raises UserError at the first link in `folder` and below that leads out of it, but for kept checkpoints."""
    home, waiting = _downloaded(folder), [str(folder)]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:  # what cannot be listed is told by who reads it
            for entry in entries:
                path = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.is_symlink() and leads_out(path, home) and not _kept(path, folder):
                    raise a_link(path, folder, code)


def _kept(path: Path, folder: Path) -> bool:
    return bool(KEPT_ELSEWHERE.fullmatch(path.relative_to(folder).as_posix()))


def refuse_link(path: Path) -> None:
    """Raises UserError where `path` itself is a link out of its folder."""
    if leads_out(path, _downloaded(path.parent)):
        raise a_link(path, path.parent)


def a_link(path: Path, folder: Path, code: int = CHECKPOINT) -> UserError:
    """What is wrong with a link."""
    hint = "put what it names in its place; the folder as a whole may be a link, or lie behind one"
    return UserError(f"{path} is a link that leads out of {folder}", hint=hint, code=code)


def _downloaded(folder: Path) -> Path:
    """`folder`, or the folder of the hub's cache it is a snapshot in: there every file is a link to ../../blobs."""
    for place in (folder.absolute(), *folder.absolute().parents):
        if place.parent.name == "snapshots" and (place.parent.parent / "blobs").is_dir():
            return place.parent.parent
    return folder


def staged(path: Path) -> Path:
    """Where what will be `path` is made, beside it: by its name `files.remove_partials` knows it."""
    return path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")


def plain_file(path: str, flags: int) -> int:
    """An opener for `open`: a file itself, never what a link names, nor a pipe or device, which would be waited for.

    Raises UserError for those.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as failure:
        if failure.errno == errno.ELOOP:
            raise a_link(Path(path), Path(path).parent) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path} is not a plain file", hint="move it away", code=CHECKPOINT)
    return handle


def open_own(path: Path, mode: str) -> IO[Any]:
    """A file of a run's own to be changed in place: `open`, with `plain_file`."""
    return open(path, mode, encoding=None if "b" in mode else "utf-8", opener=plain_file)


def without_waiting(path: str | Path, flags: int) -> int:
    """An opener for `open`: to open a pipe would wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_plain(path: Path, limit: int = LARGEST_JSON) -> bytes:
    """A small file's bytes. Raises OSError as `open` does, and ValueError for no plain file or over `limit` bytes."""
    with open(path, "rb", opener=without_waiting) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("not a plain file")
        data: bytes = file.read(min(limit, about.st_size) + 1)
    if len(data) > limit:
        raise ValueError(f"larger than {gigabytes(limit)}, the most that is read of such a file")
    return data


def read_whole(path: Path, *, code: int = CHECKPOINT, limit: int = LARGEST_JSON) -> bytes:
    """`read_plain`, raising UserError."""
    try:
        return read_plain(path, limit)
    except OSError as failure:
        raise unreadable(path, failure, code) from None
    except ValueError as failure:
        raise UserError(f"{path}: {failure}", hint="is this the right file?", code=code) from None


def unreadable(path: Path, failure: OSError, code: int = CHECKPOINT) -> UserError:
    """Why a file could not be read: what is missing or forbidden is not damaged."""
    if isinstance(failure, FileNotFoundError):
        return UserError(f"{path}: no such file", hint="is this the right folder?", code=code)
    denied = isinstance(failure, PermissionError)
    hint = "ask its owner for the right to read it, or run as its owner" if denied else "is this the right file?"
    return UserError(f"{path}: cannot be read ({failure.strerror or failure})", hint=hint, code=code)


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as `object_pairs_hook` of json.loads. Raises ValueError where a key comes twice: json itself
    silently keeps the last, and readers would disagree on which of the two counts."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r:.80} is given twice")
        values[key] = value
    return values


def read_json(path: Path, *, code: int = CHECKPOINT, limit: int = LARGEST_JSON) -> Any:
    """Parse a JSON file of at most `limit` bytes. Raises UserError where it is missing, forbidden or damaged."""
    try:
        return json.loads(read_whole(path, code=code, limit=limit).decode("utf-8"))
    except (ValueError, RecursionError) as failure:
        reason = f"{path}: not readable as JSON ({failure})"
        raise UserError(reason, hint="the file is damaged; use another copy", code=code) from None


def read_record(
    path: Path, kinds: Mapping[str, type], *, code: int = CHECKPOINT, limit: int = LARGEST_JSON, hint: str = ""
) -> dict[str, Any]:
    """A JSON object that has the keys of `kinds`, each of its type. Raises UserError naming the first that differs."""
    found = read_json(path, code=code, limit=limit)
    hint = hint or "the file is damaged or another program's; use another copy"
    if type(found) is not dict:
        reason = f"{path}: expected an object of JSON, found {CALLED.get(type(found), 'a number')}"
        raise UserError(reason, hint=hint, code=code)
    for key, kind in kinds.items():
        if key not in found:
            raise UserError(f"{path}: has no {key}", hint=hint, code=code)
        if type(found[key]) is not kind:
            reason = f"{path}: {key} must be {CALLED[kind]}, found {CALLED.get(type(found[key]), 'a number')}"
            raise UserError(reason, hint=hint, code=code)
    return found


def check_free(path: Path | str | None, overwrite: bool | None, flag: str = "--output") -> None:
    """Before the work begins: raises UserError where the file `path` cannot be written, or is there already.

    Nothing that lies there is replaced unless `overwrite`, a command's flag --overwrite; None where it has none.
    """
    if not path:
        return
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder", hint=f"give a file: {flag} FILE", code=USAGE)
    if not overwrite and os.path.lexists(path):
        hint = f"choose another {flag}" if overwrite is None else f"use --overwrite, or another {flag}"
        raise UserError(f"{path} already exists", hint=hint, code=USAGE)
    check_output(path.parent, flag=flag)


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


def check_output(folder: Path, size: int = 0, flag: str = "--output") -> None:
    """Raises UserError (code 6) where `folder` cannot become a folder to write `size` bytes in. Creates nothing."""
    place, hint = _standing(folder), f"choose another {flag}"
    if not place.is_dir():
        raise UserError(f"{place} is not a folder", hint=hint, code=DISK)
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place} cannot be written to", hint=hint, code=DISK)
    if size > (free := shutil.disk_usage(place).free):
        reason = f"{folder}: needs {gigabytes(size)}, {gigabytes(free)} free"
        raise UserError(reason, hint=f"free disk space, or {hint}", code=DISK)


def make_folder(folder: Path) -> None:
    """Create a folder to write in, parents too. Raises UserError (code 6) where that cannot be."""
    check_output(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise disk_error(folder, failure) from None


def no_index(folder: Path, *, latents: bool = False) -> UserError:
    """What is wrong with a folder of shards, of pictures or `latents`, that has no index.json."""
    if not folder.is_dir():
        why = "is not a folder" if folder.exists() else "no such folder"
        made = "encode_latents --autoencoder RUN --data PICTURES" if latents else "make_shards pack SOURCE"
        return UserError(f"{folder}: {why}", hint=f"make it: {door(made + ' --output', folder)}", code=DATA)
    if any(path for shape in PACKED for path in folder.glob(shape)):
        pack, index = door("make_shards pack SOURCE --output", folder), door("make_shards index", folder)
        hint = f"pack pictures: {pack}; or index the tars that lie there: {index}"
    else:
        hint = f"pack the pictures that lie there: {door('make_shards pack', folder, '--output', 'DIR')}"
    return UserError(f"{folder} holds no index.json", hint=hint, code=DATA)
