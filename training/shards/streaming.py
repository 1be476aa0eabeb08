"""Shards read as a stream, from front to end: for those that cannot be indexed (pipes, endless or remote collections).

    tars -> records (grouped by key, webdataset's rule) -> a buffer that shuffles them -> `training/data/arrivals.py`

Nothing is kept on disk, and nothing is known beforehand: how many samples there are, or which comes when. A run that is
resumed reads others than it would have read: exact resume does not hold here.
"""

from __future__ import annotations

import tarfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from signal import SIGPIPE
from typing import IO, Any

import webdataset
from webdataset.tariterators import group_by_keys

from training.errors import DATA, USAGE, UserError
from training.shards.addresses import redact, without_secrets
from training.shards.patterns import braces, matching
from training.shards.splits import split_of

LARGEST_MEMBER = 256 << 20  # bytes of one field; larger ones are passed over unread
KEPT = 256  # samples at the front of the stream that stand for it: in checks, and for the latents' normaliser
PATIENCE = 8  # shards in a row that cannot be read before the stream is given up
Record = dict[str, Any]  # fields by suffix, beside `__key__` and `__url__`
UNREAD, BROKEN = "__unread__", "__broken__"


def streamed_tars(names: str) -> list[str]:
    """The tars that a word of the command line names: paths and addresses with `{000..123}`, paths with `*`,
    `pipe:COMMAND`.

    Raises UserError where it names none.
    """
    if names.startswith("pipe:"):
        return [names]  # braces are the shell's
    if Path(names).is_file():
        return [names]
    starred = "://" not in names and ("*" in names or "?" in names)
    tars = [str(tar) for name in braces(names) for tar in (matching(name) if starred else [name])]
    if not tars:
        raise UserError(f"no shards match '{names}'", hint="quote brace and star patterns", code=DATA)
    for tar in tars:
        if "://" not in tar and not Path(tar).is_file():
            hint = "--stream takes tars, such as 'photos/*.tar'; a named pipe is read by 'pipe:cat NAME'"
            raise UserError(f"{redact(tar)}: no such tar", hint=hint, code=DATA)
    return tars


def open_stream(tar: str) -> Any:
    """A tar to be read from front to end: a path, an address that fsspec reads, or the output of `pipe:COMMAND`."""
    if tar.startswith("pipe:"):
        pipe = webdataset.gopen(tar)  # the command is the user's own: `--stream` is read from the command line alone
        pipe.ignore_status.append(-SIGPIPE)  # of a command that we stop reading
        return pipe
    if "://" in tar:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(tar)
        return system.open(path, "rb")
    return Path(tar).open("rb")


def members(file: IO[bytes], url: str, passed: list[str]) -> Iterator[Record]:
    """The members of an open tar, compressed or not, as webdataset groups them; the names of links, sparse and huge
    files go into `passed`.

    Tars joined end to end, as `cat *.tar` gives them, are read as one: tar itself ends at the first.
    """
    mode: Any = "r|*"
    with ExitStack() as opened:
        source: Any = file
        while source is not None:
            tar = opened.enter_context(tarfile.open(fileobj=source, mode=mode))
            for member in tar:
                if member.isreg() and not member.issparse() and member.size <= LARGEST_MEMBER:
                    data = tar.extractfile(member)
                    yield {"fname": member.name, "data": data.read() if data else b"", "__url__": url}
                elif not member.isdir():
                    passed.append(member.name)
                tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header it has read
            yield {}  # webdataset's mark for the end of a tar: what follows is of other samples
            source, mode = _joined(tar.fileobj), "r|"


class _Joined:
    """A stream from a block on that was read of it."""

    def __init__(self, block: bytes, rest: Any) -> None:
        self.block, self.rest = block, rest

    def read(self, size: int) -> bytes:
        """At most `size` bytes."""
        block, self.block = self.block[:size], self.block[size:]
        return block + (self.rest.read(size - len(block)) if len(block) < size else b"")


def _joined(rest: Any) -> _Joined | None:
    """What comes after the end of a tar and its padding, if anything does."""
    while block := rest.read(tarfile.BLOCKSIZE):
        if block.strip(b"\0"):
            return _Joined(block, rest)
    return None


@dataclass(frozen=True)
class TarStream:
    """Tars read again and again, each time in another order keyed by (seed, start, round).

    `skip`: (url, key) of records that are held out. Raises UserError(code 3) where a whole round gives no record, or
    `PATIENCE` tars in a row cannot be read.
    """

    tars: tuple[str, ...]
    seed: int = 0
    start: int = 0  # the step a run begins at: after a resume, another order
    buffer: int = 1000  # records that are shuffled among each other
    skip: frozenset[tuple[str, str]] = frozenset()

    def once(self, tars: Iterable[str]) -> Generator[Record, None, None]:
        """The records of some tars in their order. Of a tar that cannot be read to its end, or has members that are
        passed over, a record without fields says so last: `UNREAD`, and `BROKEN` where the tar is."""
        for tar in tars:
            passed: list[str] = []
            try:
                with open_stream(tar) as file:
                    yield from group_by_keys(members(file, tar, passed))
            except (OSError, tarfile.TarError, EOFError, ValueError, ImportError) as failure:
                why = without_secrets(str(failure), tar) or type(failure).__name__
                yield _unread(tar, f"cannot be read to its end ({why})") | {BROKEN: True}
            if passed:
                yield _unread(tar, f"{len(passed)} links, sparse or huge members passed over (first: {passed[0]})")

    def shared(self, reader: int, readers: int) -> Iterator[Record]:
        """The records of one of several readers, without end: of whole tars where there are enough of them, else every
        `readers`-th record of all; those of `UNREAD` go to one reader."""
        broken: list[str] = []
        whole = len(self.tars) >= readers
        for number in count():
            tars = list(self.tars)
            Random(f"{self.seed} {self.start} {number}").shuffle(tars)
            place = given = 0
            for record in self.once(tars[reader::readers] if whole else tars):
                if UNREAD in record:
                    broken += [f"{record['__key__']}: {record[UNREAD]}"] * (BROKEN in record)
                    if len(broken) >= PATIENCE:
                        raise _given_up(broken)
                    if whole or reader == 0:
                        yield record
                    continue
                broken.clear()
                if (record["__url__"], record["__key__"]) not in self.skip and (whole or place % readers == reader):
                    given += 1
                    yield record
                place += 1
            if not given:
                why = f" ({broken[-1]})" if broken else ""
                hint = "see what it names with tar -t; of few samples, fewer --num-workers read"
                what = f"the stream holds no samples for reader {reader + 1} of {readers}{why}"
                raise UserError(what, hint=hint, code=DATA)

    def shuffled(self, reader: int, readers: int) -> Iterator[Record]:
        """`shared`, through a buffer that mixes it."""
        rng = Random(f"{self.seed} {self.start} {reader}")
        mixed: Iterator[Record] = webdataset.shuffle(self.buffer, rng=rng)(self.shared(reader, readers))
        return mixed


@dataclass
class StreamedShards:
    """What stands for a `ShardSet` where shards are streamed: the records at its front, and those that have arrived for
    the slots being read."""

    stream: TarStream
    kept: list[Record]
    fields: tuple[str, ...]
    summary: dict[str, Any] = field(default_factory=dict)
    directory: Any = None
    split: str = "train"
    remote: Any = None
    arrived: dict[int, Record] = field(default_factory=dict)
    windows: None = None  # no order can be planned
    buckets: dict[Any, Any] = field(default_factory=dict)  # nor is anything known of sizes

    def __len__(self) -> int:
        return len(self.kept)

    def key(self, i: int) -> str:
        """The key of a sample that is here; of others, read in a loader process and gone, the place."""
        record = self._record(i)
        return str(record["__key__"]) if record else f"sample {i:,} of the stream"

    def read(self, i: int, fields: Iterable[str] | None = None) -> dict[str, bytes]:
        """The fields of sample i, of these only `fields` where given."""
        found = {name: value for name, value in (self._record(i) or {}).items() if name[:2] != "__"}
        return found if fields is None else {name: found[name] for name in fields if name in found}

    def _record(self, i: int) -> Record | None:
        return self.arrived.get(i) or (self.kept[i] if i < len(self.kept) else None)


def _unread(tar: str, why: str) -> Record:
    return {"__key__": redact(tar), "__url__": tar, UNREAD: why[:300]}


def _given_up(broken: list[str]) -> UserError:
    what = f"{len(broken)} shards of the stream in a row cannot be read (last: {broken[-1]})"
    return UserError(what, hint="check the address or the command; --resume auto continues a run", code=DATA)


def front(stream: TarStream, tars: Iterable[str], count: int) -> list[Record]:
    """The first `count` records of some tars, or all there are. Raises UserError where the first tars cannot be read;
    later ones are told when they are trained on."""
    records: list[Record] = []
    with closing(stream.once(tars)) as arriving:
        for record in arriving:
            if BROKEN in record and not records:
                what = f"{record['__key__']}: {record[UNREAD]}"
                raise UserError(what, hint="check the path, the address or the command", code=DATA)
            if UNREAD not in record:
                records.append(record)
            if len(records) == count:
                break
    return records


def hold_out(tars: list[str], held: int, seed: int, buffer: int) -> tuple[TarStream, list[Record], list[Record]]:
    """(the stream to train on, records at its front, records held out): of tars whose names say val or test, else the
    first `held` of all, which training then passes over.

    Raises UserError where there are too few to hold any out.
    """
    if buffer < 1:
        raise UserError(f"--shuffle-buffer: must be at least 1 (got {buffer})", code=USAGE)
    named = [tar for tar in tars if "pipe:" not in tar and split_of(Path(tar).name) in ("val", "test")]
    rest = [tar for tar in tars if tar not in named]
    if not rest:
        what = "every tar of the stream is a validation or test shard"
        raise UserError(what, hint="name those to train on", code=DATA)
    stream = TarStream(tuple(rest), seed, buffer=buffer)
    if named:
        return stream, front(stream, rest, KEPT), front(stream, named, held)
    records = front(stream, rest, held + KEPT)
    if len(records) < 2:
        raise UserError(f"the stream holds {len(records)} samples", hint="see what it names with tar -t", code=DATA)
    cut = min(held, len(records) // 2)
    skip = frozenset((record["__url__"], record["__key__"]) for record in records[:cut])
    return TarStream(tuple(rest), seed, buffer=buffer, skip=skip), records[cut:], records[:cut]
