"""Whether a folder of shards is sound."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.errors import UserError
from training.files import file_sha256
from training.guarding import leads_out
from training.ledger import Ledger
from training.pictures.decoding import MODES, load_image
from training.pictures.formats import FIELDS, several_pictures
from training.pictures.hints import EXTRA, FIELD, loaded
from training.progress import Progress
from training.shards.captions import stored_captions
from training.shards.checksums import index_of, read_limit
from training.shards.index import INDEX, Kind, ShardInfo, Size, read_index
from training.shards.offset_index import index_path, open_index
from training.shards.tars import Index, index_tar, walk_tar

SHOWN = 5  # faults of one kind that are named


@dataclass(frozen=True)
class Report:
    """What `verify` found: how much was read, and a sentence for each fault."""

    shards: int
    samples: int
    bytes: int
    problems: tuple[str, ...]
    ledger: Ledger  # what lies there and is no part of it


def first_of(found: list[str]) -> list[str]:
    """The first few sentences, and how many more there are."""
    return found[:SHOWN] + [f"… and {len(found) - SHOWN:,} more like these"] * (len(found) > SHOWN)


class Keys:
    """The keys of all shards so far, as digests of 16 bytes: a set of many million samples fits into memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._digests: set[bytes] = set()
        self._tars: list[str] = []

    def duplicates(self, keys: list[bytes], shard: str) -> tuple[list[bool], list[str]]:
        """Whether each key is in an earlier shard, and sentences on those that are; remembers the others."""
        digests = [hashlib.blake2b(key, digest_size=16).digest() for key in keys]
        seen = [digest in self._digests for digest in digests]
        self._digests.update(digests)
        self._tars.append(shard)
        twice = [key for key, known in zip(keys, seen, strict=True) if known]
        said = [f"duplicate sample key {key.decode()} ({self._home(key)}, {shard})" for key in twice[:SHOWN]]
        return seen, said + [f"duplicate sample key {key.decode()} ({shard})" for key in twice[SHOWN:]]

    def _home(self, key: bytes) -> str:
        """The first shard that holds a key, looked up where it is to be told alone."""
        for name in self._tars:
            with suppress(OSError, ValueError, LookupError):
                if key in np.load(index_path(self.directory / name), allow_pickle=False)["key"]:
                    return name
        return "another shard"


def _readable(tar: Path, index: Index) -> int:
    """How many of the samples that an index lists stand whole before the tar's damage."""
    offsets = {0}  # where a sample lacks the field
    try:
        offsets.update(member.offset for member in walk_tar(tar, []))
    except UserError:
        pass
    fields = (index.dtype.names or ())[1:]
    return sum(all(row[field]["offset"].item() in offsets for field in fields) for row in index)


def _mode(data: bytes, channels: int | None) -> str | None:
    """What is wrong with the channels of a picture that was packed here; of foreign ones nothing is known."""
    if not channels:
        return None
    with Image.open(io.BytesIO(data)) as image:
        if image.mode != MODES.get(channels):
            return f"is a picture of mode {image.mode}, {INDEX} says {channels} channels"
    return None


def _content(kind: Kind, fields: dict[str, bytes], summary: Mapping[str, Any], of: Size | None) -> str | None:
    """What is wrong with a sample's data, if anything: a picture or a hint that does not decode, one that is not `of`
    the size of its bucket, numbers that are not finite."""
    channels = summary.get("channels", 3) if summary.get("settings") else None
    if kind == "images":
        found = [name for name in FIELDS if name in fields]
        if len(found) != 1:
            return several_pictures(found) if found else f"no picture (it has: {', '.join(fields)})"
        try:
            stored_captions(fields)
            size = load_image(fields[found[0]], channels=channels or 3, suffix=f".{found[0]}").size
            if hint := summary.get("hint"):
                loaded(fields.get(FIELD, b""), hint["channels"], size[::-1])
            if of and of != size[::-1]:
                return f"is a picture of {size[1]}x{size[0]}, its shard is of {of[0]}x{of[1]} (height x width)"
        except UserError as error:
            return error.what
        return _mode(fields[found[0]], channels)
    from safetensors import SafetensorError
    from safetensors.numpy import load

    for name, data in fields.items():
        try:
            arrays = [np.load(io.BytesIO(data), allow_pickle=False)] if name.endswith(".npy") else []
            arrays += load(data).values() if name.endswith(".safetensors") else []
        except (ValueError, EOFError, OSError, SafetensorError) as error:
            return f"{name} cannot be read ({error})"
        if not all(np.isfinite(array).all() for array in arrays):
            return f"{name} is not finite"
    if hint := summary.get("hint"):
        shape = (hint["channels"], *(of or summary["latent"]["picture"]))
        for name in (f"extra-{EXTRA}.npy", *[f"mirror-{EXTRA}.npy"] * bool(summary.get("mirrored"))):
            if np.load(io.BytesIO(fields.get(name, b""))).shape != shape:
                return f"{name} is not a hint of {'x'.join(map(str, shape))}"
    return None


def _contents(
    tar: Path, index: Index, kind: Kind, summary: Mapping[str, Any], of: Size | None
) -> Iterator[str]:
    """Sentences on samples of a sound tar whose data are not sound."""
    names = (index.dtype.names or ())[1:]
    with tar.open("rb") as file:
        for row in index:
            fields = {}
            large = ""
            for name in names:
                offset, size = row[name].item()[:2]
                if size > read_limit(name):
                    large = f"{name} is too large ({size:,} bytes; at most {read_limit(name):,} are read)"
                elif offset:
                    file.seek(offset)
                    fields[name] = file.read(size)
            if why := large or _content(kind, fields, summary, of):
                yield f"{tar}: {row['key'].decode()}: {why}"


def _faults(directory: Path, info: ShardInfo, kind: Kind | None, summary: Mapping[str, Any], keys: Keys) -> list[str]:
    """Everything wrong with one shard, the first fatal finding alone."""
    tar = directory / info.name
    if not tar.is_file() or leads_out(tar):
        return [f"{tar}: listed in {INDEX} but " + ("is a link out of its folder" if tar.is_file() else "not there")]
    faults = []
    if tar.stat().st_size != info.bytes:
        faults.append(f"{tar}: has {tar.stat().st_size:,} bytes, {INDEX} says {info.bytes:,}")
    elif file_sha256(tar) != info.sha256:
        faults.append(f"{tar}: sha256 differs from {INDEX}")
    try:
        checked = open_index(tar).checked
        index: Index = np.load(index_path(tar), allow_pickle=False)
    except UserError as error:
        return [*faults, error.what]
    if len(index) != info.samples:
        faults.append(f"{tar}: its index lists {len(index)} samples, {INDEX} says {info.samples}")
    unsafe: list[str] = []
    try:
        actual = index_of(tar, unsafe) if checked else index_tar(tar, unsafe)
    except UserError as error:
        message = f"{tar}: index lists {info.samples} samples, {_readable(tar, index)} readable"
        return [*faults, error.what, message]
    faults += first_of([f"{tar}: {why}" for why in unsafe])
    if actual.dtype != index.dtype or not set(index.tolist()) <= set(actual.tolist()):
        return [*faults, f"{index_path(tar)}: does not fit its tar"]
    faults += first_of(list(_contents(tar, index, kind, summary, info.size))) if kind else []
    return faults + first_of(keys.duplicates(index["key"].tolist(), info.name)[1])


def verify(directory: str | Path, *, contents: bool = True) -> Report:
    """Hashes every byte, walks every tar and compares with both indices; with `contents`, decodes every picture and
    asks whether stored numbers are finite. Raises UserError(code 3) where there is no index."""
    directory = Path(directory)
    index, shards = read_index(directory)
    keys, ledger = Keys(directory), Ledger()
    kind: Kind | None = index["kind"] if contents else None
    read = Progress("verifying", sum(info.samples for info in shards), "sample")
    watched = read.each(shards, lambda info: info.samples)
    problems = [fault for info in watched for fault in _faults(directory, info, kind, index["summary"], keys)]
    listed = {info.name for info in shards}
    for tar in sorted(directory.glob("*.tar")):
        if tar.name not in listed:
            hidden = tar.name.startswith(".")
            ledger.add("ignored", "hidden tar" if hidden else f"tar that {INDEX} does not list", tar.name)
    samples, size = sum(info.samples for info in shards), sum(info.bytes for info in shards)
    return Report(len(shards), samples, size, tuple(problems), ledger)
