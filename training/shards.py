"""Shards: plain webdataset tars, each with a memory-mapped offset index beside it, and one `index.json` for the folder.

    DIR/train-000000.tar        KEY.png, KEY.txt, KEY.json … ; readable by anything that reads tars
    DIR/train-000000.index.npy  per sample: key, and per field offset and size
    DIR/index.json              format, kind, fields, per shard name, split, samples, bytes, sha256; summary

Every file is staged under a temporary name, synced and renamed, the tar last: a tar under its final name is whole.
`index.json` comes last of all, so a folder that has one is complete. Several processes may each write shards of their
own; one then writes the index.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from training.errors import DATA, UserError
from training.files import file_sha256, staged, write_bytes, write_json
from training.tars import END, NAME, Index, index_tar, is_safe, make_index, member_bytes

FORMAT = 1
INDEX = "index.json"
Kind = Literal["images", "latents"]
OPEN_FILES = 128  # per ShardSet and process; the least recently used is closed first


@dataclass(frozen=True)
class ShardInfo:
    """One shard as `index.json` lists it; `name` is the tar's file name."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str


def index_path(tar: Path) -> Path:
    """Where a tar's offset index lies."""
    return tar.with_suffix(".index.npy")


# --- writing ----------------------------------------------------------------------------------------------------


def write_shard(directory: Path, name: str, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> ShardInfo:
    """Writes `DIR/NAME.tar` and its index; NAME is `SPLIT-NUMBER`, such as `train-000000`. The same samples give the
    same bytes.

    Raises ValueError for a key or field that webdataset would not read back, a key given twice, or no samples at all.
    """
    tar = directory / f"{name}.tar"
    places: dict[str, dict[str, tuple[int, int]]] = {}
    digest, at = hashlib.sha256(), 0
    with staged(tar) as file:
        for key, fields in samples:
            if key in places or not fields:
                raise ValueError(f"{tar.name}: sample {key!r} " + ("is given twice" if fields else "has no fields"))
            places[key] = {}
            for field in sorted(fields):
                match = NAME.fullmatch(f"{key}.{field}")
                if not match or match[1] != key or field != field.lower() or not is_safe(key):
                    raise ValueError(f"{tar.name}: {key!r} with field {field!r} does not make a webdataset name")
                block = member_bytes(f"{key}.{field}", fields[field])
                size = len(fields[field])
                places[key][field] = (at + len(block) - size - -size % 512, size)
                digest.update(block)
                at += file.write(block)
        digest.update(END)
        at += file.write(END)
        if not places:
            raise ValueError(f"{tar.name}: a shard needs at least one sample")
        write_tar_index(tar, make_index(places))
    return ShardInfo(tar.name, name.rpartition("-")[0], len(places), at, digest.hexdigest())


def write_tar_index(tar: Path, index: Index) -> None:
    """Writes a tar's offset index beside it."""
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    write_bytes(index_path(tar), buffer.getvalue())


def sound_shard(directory: Path, name: str) -> ShardInfo | None:
    """The finished shard `NAME` (as `write_shard` names it) if tar and index are there and agree; None where it must be
    written (again)."""
    tar = directory / f"{name}.tar"
    try:
        index = np.load(index_path(tar), allow_pickle=False)
        if not np.array_equal(index, index_tar(tar)):
            return None
    except (OSError, ValueError, EOFError, UserError):
        return None
    return ShardInfo(tar.name, name.rpartition("-")[0], len(index), tar.stat().st_size, file_sha256(tar))


def write_index(directory: Path, infos: Iterable[ShardInfo], summary: Mapping[str, Any], kind: Kind = "images") -> None:
    """Writes `DIR/index.json`, the last act: shards by name, and whatever `summary` holds (JSON values).

    Raises ValueError without shards.
    """
    shards = sorted(infos, key=lambda info: info.name)
    if not shards:
        raise ValueError("an index needs at least one shard")
    fields: set[str] = set()
    for info in shards:
        fields.update((_load_index(directory / info.name).dtype.names or ())[1:])
    counts = {
        split: sum(info.samples for info in shards if info.split == split)
        for split in sorted({info.split for info in shards})
    }
    index = {
        "format": FORMAT,
        "kind": kind,
        "fields": sorted(fields),
        "shards": [asdict(info) for info in shards],
        "summary": {"counts": counts, **summary},
    }
    write_json(directory / INDEX, index)


class ShardWriter:
    """Writes one split's samples into numbered shards of `samples_per_shard`, or fewer where `max_bytes` of data are
    reached first.

    `add(key, fields)` for every sample, then `finish()` for the split's shards, to hand to `write_index`.
    """

    def __init__(self, directory: Path, split: str, samples_per_shard: int = 2000, max_bytes: int = 2**30) -> None:
        if samples_per_shard < 1 or max_bytes < 1:
            raise ValueError("samples_per_shard and max_bytes must be at least 1")
        self.directory, self.split = directory, split
        self.samples_per_shard, self.max_bytes = samples_per_shard, max_bytes
        self.infos: list[ShardInfo] = []
        self._waiting: list[tuple[str, Mapping[str, bytes]]] = []
        self._bytes = 0

    def add(self, key: str, fields: Mapping[str, bytes]) -> None:
        """Takes one sample; writes a shard whenever one is full."""
        self._waiting.append((key, fields))
        self._bytes += sum(map(len, fields.values()))
        if len(self._waiting) >= self.samples_per_shard or self._bytes >= self.max_bytes:
            self._write()

    def finish(self) -> list[ShardInfo]:
        """Writes what is left and returns all shards of the split."""
        if self._waiting:
            self._write()
        return self.infos

    def _write(self) -> None:
        self.infos.append(write_shard(self.directory, f"{self.split}-{len(self.infos):06d}", self._waiting))
        self._waiting, self._bytes = [], 0


# --- reading ----------------------------------------------------------------------------------------------------


def _again(directory: Path) -> str:
    return f"run: scripts/make_shards.py index {directory}"


def _load_index(tar: Path) -> Index:
    """A tar's offset index, memory-mapped."""
    path = index_path(tar)
    try:
        index: Index = np.load(path, mmap_mode="r", allow_pickle=False)
        if not index.dtype.names or index.dtype.names[0] != "key":
            raise ValueError("no keys")
    except (OSError, ValueError, EOFError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise UserError(f"{path}: the shard's offset index {reason}", hint=_again(tar.parent), code=DATA) from None
    return index


def read_index(directory: str | Path) -> tuple[dict[str, Any], list[ShardInfo]]:
    """`DIR/index.json` as (the whole, its shards). Raises UserError(code 3) where it is missing, damaged or of a newer
    format."""
    path = Path(directory) / INDEX
    try:
        index = json.loads(path.read_bytes())
        shards = [ShardInfo(**shard) for shard in index["shards"]]
        version, kind = int(index["format"]), index["kind"]
        sound = kind in get_args(Kind) and all(Path(info.name).name == info.name for info in shards)
    except FileNotFoundError:
        why = "holds no index.json" if Path(directory).is_dir() else "is not a folder"
        hint = f"pack one with scripts/make_shards.py pack, or index its tars: scripts/make_shards.py index {directory}"
        raise UserError(f"{directory} {why}", hint=hint, code=DATA) from None
    except (OSError, ValueError, KeyError, TypeError):
        sound, version = False, FORMAT
    if version > FORMAT:
        raise UserError(
            f"{path}: format {version} is newer than this program understands ({FORMAT})", hint="update it", code=DATA
        )
    if not sound:
        raise UserError(f"{path}: is not an index of shards", hint=_again(Path(directory)), code=DATA)
    return index, shards


class ShardSet:
    """One split of a folder of shards, read by position: `len`, `key(i)`, `read(i)`, `read_field(i, field)`.

    Indices are memory-mapped and tars opened when first read, in whichever process reads; pickling carries the path
    alone. Raises UserError(code 3) where the folder has no index or no such split, or where a shard is not as long as
    its index says.
    """

    def __init__(self, directory: str | Path, split: str = "train") -> None:
        self.directory, self.split = Path(directory), split
        index, shards = read_index(directory)
        self.kind: Kind = index["kind"]
        self.fields: tuple[str, ...] = tuple(index["fields"])
        self.summary: dict[str, Any] = index["summary"]
        self.shards = tuple(info for info in shards if info.split == split)
        if not self.shards:
            found = ", ".join(sorted({info.split for info in shards}))
            raise UserError(
                f"{directory} has no split {split!r} (it has: {found})", hint="pack with --val-fraction", code=DATA
            )
        self._indices = [self._open_index(info) for info in self.shards]
        self._ends = list(accumulate(map(len, self._indices)))
        self._files: OrderedDict[int, int] = OrderedDict()

    def __reduce__(self) -> tuple[type[ShardSet], tuple[Path, str]]:
        return ShardSet, (self.directory, self.split)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def __len__(self) -> int:
        return self._ends[-1]

    def key(self, i: int) -> str:
        """The key of sample i."""
        shard, row = self._locate(i)
        return bytes(self._indices[shard][row]["key"]).decode()

    def read(self, i: int) -> dict[str, bytes]:
        """The fields of sample i, those it has."""
        shard, row = self._locate(i)
        index = self._indices[shard]
        sample = index[row].item()  # one conversion of the whole row: (key, (offset, size), …)
        places = zip((index.dtype.names or ())[1:], sample[1:], strict=True)
        return {field: self._bytes(shard, offset, size) for field, (offset, size) in places if offset}

    def read_field(self, i: int, field: str) -> bytes:
        """One field of sample i. Raises UserError(code 3) where the sample lacks it."""
        shard, row = self._locate(i)
        index = self._indices[shard]
        offset, size = index[field][row].item() if field in (index.dtype.names or ()) else (0, 0)
        if not offset:
            raise UserError(f"{self.shards[shard].name}: sample {self.key(i)} has no {field}", code=DATA)
        return self._bytes(shard, offset, size)

    def _open_index(self, info: ShardInfo) -> Index:
        tar = self.directory / info.name
        if not tar.is_file():
            raise UserError(f"{tar}: listed in {INDEX} but not there", hint=_again(self.directory), code=DATA)
        index = _load_index(tar)
        size = tar.stat().st_size
        if size != info.bytes:
            raise UserError(
                f"{tar}: has {size:,} bytes, its index says {info.bytes:,}", hint=_again(self.directory), code=DATA
            )
        if len(index) != info.samples:
            what = f"{tar}: its index lists {len(index)} samples, {INDEX} says {info.samples}"
            raise UserError(what, hint=_again(self.directory), code=DATA)
        return index

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < self._ends[-1]:
            raise IndexError(f"sample {i} of {self._ends[-1]}")
        shard = bisect_right(self._ends, i)
        return shard, i - (self._ends[shard - 1] if shard else 0)

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.directory / self.shards[shard].name, os.O_RDONLY)
        data = os.pread(self._files[shard], size, offset)
        if len(data) != size:
            what = f"{self.directory / self.shards[shard].name}: damaged at byte {offset:,}: unexpected end of data"
            raise UserError(what, hint="run: scripts/make_shards.py verify " + str(self.directory), code=DATA)
        return data
