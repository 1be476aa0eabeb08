"""Shards that lie elsewhere: any address that fsspec reads, whole shards kept in a cache of bounded size.

    CACHE/lock                   held while room is made
    CACHE/<16 hex>/index.json    one folder for each address and index; offset indices and models beside it, read once
    CACHE/<16 hex>/NAME.tar      shards, the least recently read removed first; NAME.tar.lock is held while one comes

A shard appears under its name whole, its size and sha256 those of `index.json`. Processes may share a cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from training.errors import CHECKPOINT, DISK, Unreachable, UserError
from training.files import write_bytes
from training.guarding import PARTIAL, disk_error, gigabytes, make_folder
from training.shards.addresses import cache_folder, redact, without_secrets
from training.shards.index import INDEX
from training.shards.tars import is_safe

if TYPE_CHECKING:
    from training.shards.index import ShardInfo

LARGEST_FILE = 4 << 30  # bytes of a file beside the shards
TEXT = "text_encoder"  # the folder beside latents, whose files only a listing names
NULL = f"{TEXT}/null.safetensors"  # in it, the embedding of the empty caption
CHUNK = 8 << 20
ATTEMPTS = 5
PAUSE = 1.0  # seconds before the second attempt, doubled before each further one
AT_ONCE = 8  # small files
ROOM = "give a larger --cache-size (GB), or lower --train.window_shards"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Remote:
    """A folder of shards at an address, and the local folder that stands for it: `Path(remote)` holds its index.

    Shown without user, password and query. Built by `open_address`.
    """

    address: str = field(repr=False)
    cache: Path
    limit: int  # bytes of shards in the cache, those of all addresses together
    window: int  # shards that the order mixes
    folder: Path
    prefetch: bool = True  # fetch the next window's shards while this one's are read: the cache must hold two windows

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return redact(self.address)

    def bring(self, names: Iterable[str]) -> None:
        """Fetches small files that are not here yet. Raises Unreachable."""
        missing = [name for name in names if not (self.folder / name).is_file()]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._bring, missing))

    def _bring(self, name: str) -> None:
        data = read_bytes(self.address, name)
        make_folder((self.folder / name).parent)
        write_bytes(self.folder / name, data)

    def bring_models(self, *, text: bool) -> None:
        """Fetches what lies beside latents: the autoencoder and, where `text`, the text encoder. Raises Unreachable."""
        self.bring(["autoencoder/config.json", "autoencoder/model.safetensors"])
        if text:
            names = retry(self.address, TEXT, self._text_files)
            refuse_without_null(NULL in names)
            self.bring(names)

    def _text_files(self) -> list[str]:
        system, root = _opened(self.address, TEXT)
        names = [f"{TEXT}/{str(path).rpartition(f'/{TEXT}/')[2]}" for path in system.find(root)]
        return [name for name in names if is_safe(name)]

    def read(self, shard: ShardInfo, size: int, offset: int) -> bytes:
        """At most `size` bytes of a shard, which is fetched where it is not in the cache. Raises Unreachable."""
        for _ in range(ATTEMPTS):
            try:
                with (self.folder / shard.name).open("rb", buffering=0) as file:
                    if os.fstat(file.fileno()).st_size == shard.bytes:
                        _touch(file.fileno())
                        return os.pread(file.fileno(), size, offset)
            except FileNotFoundError:
                pass
            self.fetch(shard)
        raise Unreachable(f"{self.cache}: {shard.name} is removed before it can be read", hint=ROOM, code=DISK)

    def fetch(self, shard: ShardInfo) -> None:
        """Brings a shard into the cache, or marks the one that is there as used. Raises Unreachable where it cannot be
        read or is not the one that was indexed, UserError (code 6) where it cannot be kept."""
        tar = self.folder / shard.name
        partial = self.folder / f".{shard.name}{PARTIAL}"
        make_folder(self.folder)
        try:
            with _locked(_lock_of(tar)):
                if tar.is_file() and tar.stat().st_size == shard.bytes:
                    _touch(tar)
                    return
                try:
                    with partial.open("wb") as file:
                        self._make_room(shard.bytes, file)
                        retry(self.address, shard.name, lambda: self._copy(shard, file))
                        file.flush()
                        os.fsync(file.fileno())
                    _touch(partial)
                    partial.replace(tar)
                finally:
                    with suppress(OSError):  # the first error is the one to tell
                        partial.unlink(missing_ok=True)
        except OSError as failure:
            raise _unkept(tar, failure) from None

    def _copy(self, shard: ShardInfo, file: BinaryIO) -> None:
        file.seek(0)
        file.truncate(shard.bytes)  # an earlier attempt may have brought too much
        size, digest = _pour(self.address, shard.name, file, shard.bytes)
        if (size, digest) != (shard.bytes, shard.sha256):
            what = f"{size:,} bytes of sha256 {digest[:12]}, {INDEX} says {shard.bytes:,} of {shard.sha256[:12]}"
            raise ConnectionError(f"{what}: damaged on its way, or changed after indexing")

    def _make_room(self, size: int, file: BinaryIO) -> None:
        """Removes shards until `size` bytes more fit, and reserves them by the length of `file`; where others' arriving
        shards take the room, waits for them."""
        if size > self.limit:
            what = f"a shard of {gigabytes(size)} does not fit into a cache of {gigabytes(self.limit)}"
            raise Unreachable(what, hint=ROOM, code=DISK)
        while True:
            with _locked(self.cache / "lock"):
                room = self.limit - size - sum(map(_arriving, self.cache.glob(f"*/.*{PARTIAL}")))
                if room >= 0:
                    held = sorted(_stamped(self.cache.glob("*/*.tar")))
                    room -= sum(length for _, length, _ in held)
                    for _, length, tar in held:
                        if room >= 0:
                            break
                        tar.unlink(missing_ok=True)
                        room += length
                    file.truncate(size)
                    return
            time.sleep(0.1)


def open_address(
    address: str | Path,
    cache_dir: str | None = None,
    cache_size: float = 20.0,
    window: int = 16,
    *,
    prefetch: bool = True,
) -> Path | Remote:
    """The folder that `--data` or `--latents` names: a path as it is; an address as a `Remote`, its index read.

    `cache_size` in GB. Raises UserError for an address that nothing here reads, Unreachable where it has no index.
    """
    text = str(address)
    if text.startswith("pipe:") or ("://" in text and "::" in text):
        raise UserError(f"{text.partition(':')[0]}: commands and chains of addresses are refused", hint="name a folder")
    if "://" not in text:
        return Path(address)
    if not cache_size > 0:
        raise UserError(f"--cache-size: must be > 0 (got {cache_size})")
    try:
        _opened(text, INDEX)
    except (ImportError, ValueError) as failure:
        raise UserError(f"{redact(text)}: {failure}", hint="install the package that reads such addresses") from None
    index = read_bytes(text, INDEX)
    cache = cache_folder(cache_dir)
    folder = cache / hashlib.sha256(redact(text).encode() + b"\0" + index).hexdigest()[:16]
    make_folder(folder)
    if not (folder / INDEX).is_file():
        write_bytes(folder / INDEX, index)
    return Remote(text, cache, int(cache_size * 1e9), window, folder, prefetch)


def refuse_without_null(there: bool) -> None:
    """Raises UserError (code 4) where beside stored text embeddings that of the empty caption is not `there`."""
    if not there:
        what = f"these latents hold text embeddings, but not that of the empty caption ({NULL})"
        hint = "caption dropout and guidance need it; run the same encode_latents again, which adds it"
        raise UserError(what, hint=hint, code=CHECKPOINT)


def retry(address: str, name: str, attempt: Callable[[], Result]) -> Result:
    """What `attempt` gives, tried again where it fails. Raises Unreachable."""
    file = f"{redact(address).rstrip('/')}/{name}"
    for wait in [PAUSE * 2**n for n in range(ATTEMPTS - 1)] + [0.0]:
        try:
            return attempt()
        except (UserError, _Local):
            raise
        except (FileNotFoundError, PermissionError) as failure:
            why = "is not there" if isinstance(failure, FileNotFoundError) else "may not be read"
            raise Unreachable(f"{file} {why}", hint="check the address and your permissions") from None
        except Exception as failure:  # each filesystem has kinds of its own
            reason = f"{type(failure).__name__}: {without_secrets(str(failure), address)}"[:300]
        time.sleep(wait)
    what = f"{file} could not be read in {ATTEMPTS} attempts ({reason})"
    raise Unreachable(what, hint="check the connection and the file; --resume auto continues a run")


def read_bytes(address: str, name: str) -> bytes:
    """A small file at an address. Raises Unreachable."""

    def attempt() -> bytes:
        file = io.BytesIO()
        _pour(address, name, file, LARGEST_FILE)
        return file.getvalue()

    return retry(address, name, attempt)


class _Local(OSError):
    """A fault of the disk here, not of the other side."""


def _pour(address: str, name: str, file: BinaryIO, limit: int) -> tuple[int, str]:
    """(bytes, sha256) of what is copied into `file`; a byte more than `limit` ends it."""
    size, digest = 0, hashlib.sha256()
    system, path = _opened(address, name)
    with system.open(path, "rb") as source:
        while size <= limit and (chunk := source.read(min(CHUNK, limit + 1 - size))):
            size += len(chunk)
            digest.update(chunk)
            try:
                file.write(chunk)
            except OSError as failure:
                raise _Local(failure.errno, failure.strerror) from None
    return size, digest.hexdigest()


def _opened(address: str, name: str) -> tuple[Any, str]:
    """The filesystem of an address, and the path of a file in it; asked for anew, as clients do not outlive a fork."""
    from fsspec.core import url_to_fs

    base, mark, query = address.partition("?")
    system, path = url_to_fs(f"{base.rstrip('/')}/{name}{mark}{query}")
    return system, str(path)


def _unkept(tar: Path, failure: OSError) -> Unreachable:
    hint = "free disk space, or choose another --cache-dir or a smaller --cache-size"
    return Unreachable(disk_error(tar, failure).what, hint=hint, code=DISK)


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds a file's lock. Raises BlockingIOError where it is held and `wait` is off."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a fork has inherited the file


def _lock_of(tar: Path) -> Path:
    return tar.with_name(f"{tar.name}.lock")


def _arriving(partial: Path) -> int:
    """The room a shard on its way has reserved; what a dead process left is removed."""
    try:
        with _locked(_lock_of(partial.with_name(partial.name[1 : -len(PARTIAL)])), wait=False):
            partial.unlink(missing_ok=True)
        return 0
    except BlockingIOError:
        with suppress(FileNotFoundError):
            return partial.stat().st_size
        return 0


def _touch(file: int | Path) -> None:
    """Stamps a file as used now, to the nanosecond: the system's own stamp is too coarse to tell reads apart."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _stamped(tars: Iterable[Path]) -> Iterator[tuple[int, int, Path]]:
    """(last use, bytes, path) of each."""
    for tar in tars:
        with suppress(FileNotFoundError):
            state = tar.stat()
            yield state.st_mtime_ns, state.st_size, tar
