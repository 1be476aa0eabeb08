"""Whether a folder of shards is sound, and the index of tars that came from elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import DATA, UserError
from training.files import file_sha256, leads_out
from training.pictures.decoding import SUFFIXES, load_image
from training.shards.index import INDEX, SPLITS, Kind, ShardInfo, read_index, write_index
from training.shards.offset_index import index_path, open_index, write_tar_index
from training.shards.tars import Index, index_tar, walk_tar

SHOWN = 5  # faults of one kind that are named


@dataclass(frozen=True)
class Report:
    """What `verify` found: how much was read, and a sentence for each fault."""

    shards: int
    samples: int
    bytes: int
    problems: tuple[str, ...]


def _first(found: list[str]) -> list[str]:
    """The first few sentences, and how many more there are."""
    return found[:SHOWN] + [f"… and {len(found) - SHOWN:,} more like these"] * (len(found) > SHOWN)


def _duplicates(homes: dict[str, str], keys: list[str], shard: str) -> list[str]:
    """Sentences on keys already seen in another shard; remembers the others."""
    found = [f"duplicate sample key {key} ({homes[key]}, {shard})" for key in keys if key in homes]
    homes.update((key, shard) for key in keys if key not in homes)
    return found


def _readable(tar: Path, index: Index) -> int:
    """How many of the samples that an index lists stand whole before the tar's damage."""
    offsets = {0}  # where a sample lacks the field
    try:
        offsets.update(member.offset for member in walk_tar(tar, []))
    except UserError:
        pass
    fields = (index.dtype.names or ())[1:]
    return sum(all(row[field]["offset"].item() in offsets for field in fields) for row in index)


def _content(kind: Kind, fields: dict[str, bytes]) -> str | None:
    """What is wrong with a sample's data, if anything: a picture that does not decode, numbers that are not finite."""
    if kind == "images":
        data = next((fields[name[1:]] for name in SUFFIXES if name[1:] in fields), None)
        if data is None:
            return f"no picture (it has: {', '.join(fields)})"
        try:
            load_image(data)
        except UserError as error:
            return error.what
        return None
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
    return None


def _contents(tar: Path, index: Index, kind: Kind) -> Iterator[str]:
    """Sentences on samples of a sound tar whose data are not sound."""
    names = (index.dtype.names or ())[1:]
    with tar.open("rb") as file:
        for row in index:
            fields = {}
            for name in names:
                offset, size = row[name].item()
                if offset:
                    file.seek(offset)
                    fields[name] = file.read(size)
            if why := _content(kind, fields):
                yield f"{tar}: {row['key'].decode()}: {why}"


def _faults(directory: Path, info: ShardInfo, kind: Kind | None, homes: dict[str, str]) -> list[str]:
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
        open_index(tar)
        index: Index = np.load(index_path(tar), allow_pickle=False)
    except UserError as error:
        return [*faults, error.what]
    if len(index) != info.samples:
        faults.append(f"{tar}: its index lists {len(index)} samples, {INDEX} says {info.samples}")
    unsafe: list[str] = []
    try:
        actual = index_tar(tar, unsafe)
    except UserError as error:
        message = f"{tar}: index lists {info.samples} samples, {_readable(tar, index)} readable"
        return [*faults, error.what, message]
    faults += _first([f"{tar}: {why}" for why in unsafe])
    if actual.dtype != index.dtype or not set(index.tolist()) <= set(actual.tolist()):
        return [*faults, f"{index_path(tar)}: does not fit its tar"]
    faults += _first(list(_contents(tar, index, kind))) if kind else []
    return faults + _first(_duplicates(homes, [key.decode() for key in index["key"].tolist()], info.name))


def verify(directory: str | Path, *, contents: bool = True) -> Report:
    """Hashes every byte, walks every tar and compares with both indices; with `contents`, decodes every picture and
    asks whether stored numbers are finite. Raises UserError(code 3) where there is no index."""
    directory = Path(directory)
    index, shards = read_index(directory)
    homes: dict[str, str] = {}
    kind: Kind | None = index["kind"] if contents else None
    problems = [fault for info in shards for fault in _faults(directory, info, kind, homes)]
    return Report(
        len(shards), sum(info.samples for info in shards), sum(info.bytes for info in shards), tuple(problems)
    )


def _kept(directory: Path) -> tuple[dict[str, Any], Kind]:
    """Summary (without the counts, which are made anew) and kind of the index already there, if it can be read."""
    try:
        old, _ = read_index(directory)
    except UserError:
        return {}, "images"
    return {name: value for name, value in old["summary"].items() if name != "counts"}, old["kind"]


def _lacking(directory: Path, infos: list[ShardInfo]) -> list[str]:
    """Sentences on fields that only some samples have."""
    indices = [index_path(directory / info.name) for info in infos]
    names = [open_index(directory / info.name).fields for info in infos]
    sentences = []
    for field in sorted({name for fields_here in names for name in fields_here}):
        keys: list[str] = []
        lacking = 0
        for path, fields_here in zip(indices, names, strict=True):
            rows: Index = np.load(path, allow_pickle=False)
            rows = rows[rows[field]["offset"] == 0] if field in fields_here else rows
            lacking += len(rows)
            keys += [key.decode() for key in rows["key"][: SHOWN - len(keys)].tolist()]
        if lacking:
            sentences.append(f"{lacking:,} samples without {field} (first: {', '.join(keys)})")
    return sentences


def _indexed(tar: Path, homes: dict[str, str], left_out: list[str] | None) -> Index:
    """A tar's index; samples whose key another tar has are refused, or described in `left_out` and left out."""
    if leads_out(tar):
        raise UserError(f"{tar}: is a link out of its folder", hint="copy the shard itself there", code=DATA)
    index = index_tar(tar, left_out)
    keys = [key.decode() for key in index["key"].tolist()]
    fresh = np.array([key not in homes for key in keys])
    if repeated := _duplicates(homes, keys, tar.name):
        if left_out is None:
            raise UserError(repeated[0], hint="every sample needs a key of its own", code=DATA)
        left_out += repeated
    if not fresh.any():
        raise UserError(f"{tar}: all its samples are in other tars", code=DATA)
    kept: Index = index[fresh]
    return kept


def index_folder(directory: str | Path, *, skip: bool = False) -> list[ShardInfo]:
    """Indexes the tars of a folder where they lie: an offset index beside each, and `index.json`.

    The split is the file name up to its first `-` where that is train, val or test, else train. A summary already there
    is kept; its `index_notes` say what was left out and what some samples lack. Raises UserError(code 3) where there
    are no tars, one is not sound, or a key occurs twice; `skip` leaves such tars and samples out instead.
    """
    directory = Path(directory)
    tars = sorted(directory.glob("*.tar"))
    if not tars:
        raise UserError(f"{directory}: no tars in this folder", hint="expected files such as 00000.tar", code=DATA)
    summary, kind = _kept(directory)
    infos: list[ShardInfo] = []
    left_out: list[str] = []
    homes: dict[str, str] = {}
    for tar in tars:
        try:
            index = _indexed(tar, homes, left_out if skip else None)
        except UserError as error:
            if not skip:
                raise
            left_out.append(f"{error.what}; the shard is left out")
            continue
        prefix = tar.name.split("-")[0]
        split = prefix if prefix in SPLITS else "train"
        write_tar_index(tar, index)
        infos.append(ShardInfo(tar.name, split, len(index), tar.stat().st_size, file_sha256(tar)))
    if not infos:
        raise UserError(f"{directory}: no sound tars ({left_out[0]})", code=DATA)
    write_index(directory, infos, {**summary, "index_notes": _first(left_out) + _lacking(directory, infos)}, kind)
    return infos
