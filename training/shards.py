"""Shards: plain webdataset tars, each with an offset index beside it, and one `index.json` for the folder.

    DIR/train-000000.tar        KEY.png, KEY.txt, KEY.json … ; readable by anything that reads tars
    DIR/train-000000.index.npy  per sample: key, and per field offset and size
    DIR/index.json              format, kind, fields, per shard name, split, samples, bytes, sha256; summary

Every file is staged under a temporary name, synced and renamed, the tar last: a tar under its final name is whole.
`index.json` comes last of all, so a folder that has one is complete. Several processes may each write shards of their
own; one then writes the index.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from struct import error as StructError
from typing import Any, Literal, get_args

import numpy as np

from training.errors import DATA, UserError
from training.files import file_sha256, leads_out, staged, write_json
from training.offsets import Descriptors, Layout, again, index_path, members, open_index, write_tar_index
from training.remote import INDEX as INDEX  # pack and verify take it from here
from training.remote import Remote
from training.tars import END, NAME, index_tar, is_safe, make_index, member_bytes

FORMAT = 1
Kind = Literal["images", "latents"]
LARGEST_INDEX = 64 << 20  # bytes: some 300,000 shards
OPEN_FILES = 256  # per ShardSet and process; most systems allow a process 1024


@dataclass(frozen=True)
class ShardInfo:
    """One shard as `index.json` lists it; `name` is the tar's file name."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str


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


def sound_shard(directory: Path, name: str) -> ShardInfo | None:
    """The finished shard `NAME` (as `write_shard` names it) if tar and index are there and agree; None where it must be
    written (again)."""
    tar = directory / f"{name}.tar"
    try:
        open_index(tar)
        index = np.load(index_path(tar), allow_pickle=False)
        if not np.array_equal(index, index_tar(tar)):
            return None
    except (OSError, UserError):
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
        fields.update(open_index(directory / info.name).fields)
    splits = sorted({info.split for info in shards})
    counts = {split: sum(info.samples for info in shards if info.split == split) for split in splits}
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

    def __init__(self, directory: Path, split: str, samples_per_shard: int = 2000, max_bytes: int = 2**28) -> None:
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


def _is_sound(info: ShardInfo) -> bool:
    """Whether what index.json says of a shard has the right types, and a name that stays in the folder."""
    numbers = all(type(number) is int and number >= 0 for number in (info.samples, info.bytes))
    texts = all(isinstance(text, str) for text in (info.name, info.split, info.sha256))
    return numbers and texts and is_safe(info.name) and Path(info.name).name == info.name and info.name[-4:] == ".tar"


def read_index(directory: str | Path | Remote) -> tuple[dict[str, Any], list[ShardInfo]]:
    """`DIR/index.json` as (the whole, its shards). Raises UserError(code 3) where it is missing, damaged or of a newer
    format."""
    path = Path(directory) / INDEX
    try:
        if path.stat().st_size > LARGEST_INDEX or leads_out(path):
            raise ValueError
        index = json.loads(path.read_bytes())
        version = int(index["format"])
        shards = [ShardInfo(**shard) for shard in index["shards"]] if version <= FORMAT else []
        sound = index["kind"] in get_args(Kind) and isinstance(index["summary"], dict) and all(map(_is_sound, shards))
        sound = sound and len({info.name for info in shards}) == len(shards)
        sound = sound and all(isinstance(field, str) for field in index["fields"])
    except FileNotFoundError:
        why = "holds no index.json" if Path(directory).is_dir() else "is not a folder"
        hint = f"pack one with scripts/make_shards.py pack, or index its tars; {again(Path(directory))}"
        raise UserError(f"{directory} {why}", hint=hint, code=DATA) from None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        sound, version = False, FORMAT
    if version > FORMAT:
        what = f"{path}: format {version} is newer than this program understands ({FORMAT})"
        raise UserError(what, hint="update it", code=DATA)
    if not sound:
        raise UserError(f"{path}: is not an index of shards", hint=again(Path(directory)), code=DATA)
    return index, shards


class ShardSet:
    """One split of a folder of shards, read by position: `len`, `key(i)`, `read(i)`, `read_field(i, field)`.

    Rows and data are read when asked for, in whichever process asks; pickling carries the path alone. Raises
    UserError(code 3) where the folder has no index or no such split, or where a shard is not as long as its index says;
    when reading, where the data are not where the index says.
    """

    def __init__(self, directory: str | Path | Remote, split: str = "train") -> None:
        self.directory, self.split = Path(directory), split
        self.remote = directory if isinstance(directory, Remote) else None
        index, shards = read_index(directory)
        self.kind: Kind = index["kind"]
        self.fields: tuple[str, ...] = tuple(index["fields"])
        self.summary: dict[str, Any] = index["summary"]
        self.shards = tuple(info for info in shards if info.split == split)
        if not self.shards:
            found = ", ".join(sorted({info.split for info in shards}))
            what = f"{directory} has no split {split!r} (it has: {found})"
            raise UserError(what, hint="pack with --val-fraction", code=DATA)
        tars = [self.directory / info.name for info in self.shards]
        if self.remote:
            self.remote.bring(index_path(tar).name for tar in tars)
        self._tars, self._indices = list(map(str, tars)), [str(index_path(tar)) for tar in tars]
        self._layouts = [self._checked(info, tar) for info, tar in zip(self.shards, tars, strict=True)]
        self._ends = list(accumulate(info.samples for info in self.shards))
        self._files = Descriptors(OPEN_FILES)

    def __reduce__(self) -> tuple[type[ShardSet], tuple[Path | Remote, str]]:
        return ShardSet, (self.remote or self.directory, self.split)

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self._files.close()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def windows(self) -> tuple[tuple[int, ...], int]:
        """How a training mixes the split, as `DataOrder` takes it: the samples of each shard, the shards of a window;
        () and 0 where the shards are local: these are mixed as one."""
        return (tuple(info.samples for info in self.shards), self.remote.window) if self.remote else ((), 0)

    def key(self, i: int) -> str:
        """The key of sample i."""
        return self._row(*self._locate(i))[0]

    def read(self, i: int, fields: Container[str] | None = None) -> dict[str, bytes]:
        """The fields of sample i, those it has; of these only `fields` where given."""
        shard, row = self._locate(i)
        key, places = self._row(shard, row)
        wanted = places if fields is None else {name: place for name, place in places.items() if name in fields}
        return self._data(shard, key, wanted)

    def read_field(self, i: int, field: str) -> bytes:
        """One field of sample i. Raises UserError(code 3) where the sample lacks it."""
        found = self.read(i, (field,))
        if field not in found:
            raise UserError(f"{self.shards[self._locate(i)[0]].name}: sample {self.key(i)} has no {field}", code=DATA)
        return found[field]

    def _checked(self, info: ShardInfo, tar: Path) -> Layout:
        if not (self.remote or tar.is_file()):
            raise UserError(f"{tar}: listed in {INDEX} but not there", hint=again(self.directory), code=DATA)
        if leads_out(tar):
            raise UserError(f"{tar}: is a link out of its folder", hint="copy the shard itself there", code=DATA)
        size, layout = info.bytes if self.remote else tar.stat().st_size, open_index(tar)
        if size != info.bytes:
            what = f"{tar}: has {size:,} bytes, its index says {info.bytes:,}"
            raise UserError(what, hint=again(self.directory), code=DATA)
        if layout.rows != info.samples:
            what = f"{tar}: its index lists {layout.rows} samples, {INDEX} says {info.samples}"
            raise UserError(what, hint=again(self.directory), code=DATA)
        return layout

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < self._ends[-1]:
            raise IndexError(f"sample {i} of {self._ends[-1]}")
        shard = bisect_right(self._ends, i)
        return shard, i - (self._ends[shard - 1] if shard else 0)

    def _row(self, shard: int, row: int) -> tuple[str, dict[str, tuple[int, int]]]:
        layout = self._layouts[shard]
        data = self._files.read(self._indices[shard], layout.row.size, layout.start + row * layout.row.size)
        try:
            raw, places = layout.places(data)
            key = raw.decode()
            if is_safe(key):
                return key, places
            raise ValueError(key)
        except (StructError, ValueError):
            raise UserError(f"{self._indices[shard]}: damaged", hint=again(self.directory), code=DATA) from None

    def _data(self, shard: int, key: str, places: dict[str, tuple[int, int]]) -> dict[str, bytes]:
        info, tar = self.shards[shard], self._tars[shard]
        if self.remote is None:
            return members(partial(self._files.read, tar), tar, info.bytes, key, places)
        return members(partial(self.remote.read, info), tar, info.bytes, key, places)
