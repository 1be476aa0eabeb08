"""Whether a folder of shards is sound, and the index of tars that came from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import DATA, UserError
from training.files import file_sha256
from training.shards import INDEX, Kind, ShardInfo, index_path, read_index, write_index, write_tar_index
from training.sources import SPLITS
from training.tars import index_tar


@dataclass(frozen=True)
class Report:
    """What `verify` found: how much was read, and a sentence for each fault."""

    shards: int
    samples: int
    bytes: int
    problems: tuple[str, ...]


def _duplicates(homes: dict[str, str], keys: list[str], shard: str) -> list[str]:
    """Sentences on keys already seen in another shard; remembers the others."""
    found = [f"duplicate sample key {key} ({homes[key]}, {shard})" for key in keys if key in homes]
    homes.update((key, shard) for key in keys if key not in homes)
    return found


def _faults(directory: Path, info: ShardInfo, homes: dict[str, str]) -> list[str]:
    """Everything wrong with one shard, the first fatal finding alone."""
    tar = directory / info.name
    if not tar.is_file():
        return [f"{tar}: listed in {INDEX} but not there"]
    faults = []
    if tar.stat().st_size != info.bytes:
        faults.append(f"{tar}: has {tar.stat().st_size:,} bytes, {INDEX} says {info.bytes:,}")
    elif file_sha256(tar) != info.sha256:
        faults.append(f"{tar}: sha256 differs from {INDEX}")
    try:
        walked = index_tar(tar)
    except UserError as error:
        return [*faults, error.what]
    if len(walked) != info.samples:
        faults.append(f"{tar}: index lists {info.samples} samples, {len(walked)} readable")
    try:
        same = np.array_equal(walked, np.load(index_path(tar), allow_pickle=False))
    except (OSError, ValueError, EOFError):
        same = False
    if not same:
        faults.append(f"{index_path(tar)}: does not fit its tar")
    return faults + _duplicates(homes, [key.decode() for key in walked["key"].tolist()], info.name)


def verify(directory: str | Path) -> Report:
    """Hashes every byte, walks every tar and compares with both indices. Raises UserError(code 3) where there is no
    index."""
    directory = Path(directory)
    _, shards = read_index(directory)
    homes: dict[str, str] = {}
    problems = [fault for info in shards for fault in _faults(directory, info, homes)]
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


def index_folder(directory: str | Path) -> list[ShardInfo]:
    """Indexes the tars of a folder where they lie: an offset index beside each, and `index.json`.

    The split is the file name up to its first `-` where that is train, val or test, else train. A summary already there
    is kept. Raises UserError(code 3) where there are no tars, one is not sound, or a key occurs twice.
    """
    directory = Path(directory)
    tars = sorted(directory.glob("*.tar"))
    if not tars:
        raise UserError(f"{directory}: no tars in this folder", hint="expected files such as 00000.tar", code=DATA)
    summary, kind = _kept(directory)
    infos: list[ShardInfo] = []
    homes: dict[str, str] = {}
    for tar in tars:
        index = index_tar(tar)
        if repeated := _duplicates(homes, [key.decode() for key in index["key"].tolist()], tar.name):
            raise UserError(repeated[0], hint="every sample needs a key of its own", code=DATA)
        prefix = tar.name.split("-")[0]
        split = prefix if prefix in SPLITS else "train"
        write_tar_index(tar, index)
        infos.append(ShardInfo(tar.name, split, len(index), tar.stat().st_size, file_sha256(tar)))
    write_index(directory, infos, summary, kind)
    return infos
