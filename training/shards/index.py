"""index.json of a folder of shards: what each shard holds, written once, read and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from training.errors import DATA, UserError
from training.files import file_sha256, write_json
from training.guarding import leads_out, no_index, read_record
from training.pictures.hints import hint_of
from training.shards.offset_index import open_index, reindex_hint
from training.shards.tars import is_safe

SPLITS = ("train", "val", "test")
INDEX = "index.json"
PACKING = "packing.json"  # in a folder of pictures, what they are being packed from: written first
ENCODING = "encoding.json"  # in a folder of latents, what they are being made from
FORMAT = 2  # of shards of one size each; those of others are written as 1, which earlier versions read
Kind = Literal["images", "latents"]
Size = tuple[int, int]  # height and width in pixels
LARGEST_INDEX = 64 << 20  # bytes: some 300,000 shards


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard as `index.json` lists it; `name` is the tar's file name. `size`: height and width in pixels of all its
    pictures, where each shard is of one bucket; None where that is not said."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str
    size: Size | None = None

    def listed(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def listed_shard(values: Mapping[str, Any]) -> ShardInfo:
    """The inverse of `ShardInfo.listed`. Raises TypeError, ValueError for anything else."""
    info = ShardInfo(**values)
    if info.size is None:
        return info
    height, width = info.size
    return replace(info, size=(height, width))


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
        "format": FORMAT if any(info.size for info in shards) else 1,
        "kind": kind,
        "fields": sorted(fields),
        "shards": [info.listed() for info in shards],
        "summary": {"counts": counts, **summary},
    }
    write_json(directory / INDEX, index)


def _is_sound(info: ShardInfo) -> bool:
    """Whether what index.json says of a shard has the right types, and a name that stays in the folder."""
    numbers = all(type(number) is int and number >= 0 for number in (info.samples, info.bytes))
    texts = all(isinstance(text, str) for text in (info.name, info.split, info.sha256))
    size = info.size is None or (len(info.size) == 2 and all(type(side) is int and side > 0 for side in info.size))
    named = texts and is_safe(info.name) and Path(info.name).name == info.name and info.name[-4:] == ".tar"
    return numbers and named and size


def read_index(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], list[ShardInfo]]:
    """`DIR/index.json` as (the whole, its shards). Raises UserError(code 3) where it is missing, damaged or of a newer
    format."""
    path = Path(directory) / INDEX
    try:
        if path.stat().st_size > LARGEST_INDEX or leads_out(path):
            raise ValueError
        index = json.loads(path.read_bytes())
        version = int(index["format"])
        shards = [listed_shard(shard) for shard in index["shards"]] if version <= FORMAT else []
        sound = index["kind"] in get_args(Kind) and isinstance(index["summary"], dict) and all(map(_is_sound, shards))
        sound = sound and len({info.name for info in shards}) == len(shards)
        sound = sound and len({info.size is None for info in shards}) <= 1
        sound = sound and all(isinstance(field, str) for field in index["fields"])
    except FileNotFoundError:
        raise no_index(Path(directory)) from None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        sound, version = False, FORMAT
    if version > FORMAT:
        what = f"{path}: format {version} is newer than this program understands ({FORMAT})"
        raise UserError(what, hint="update it", code=DATA)
    if not sound:
        raise UserError(f"{path}: is not an index of shards", hint=reindex_hint(Path(directory)), code=DATA)
    return index, shards


def hint_summary(settings: Mapping[str, Any], made: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What the summary of pictures says of the hints beside them, by the settings they were packed with: their kind,
    their channels, the range of their files where one was given, and how many were `made` by each rule; nothing where
    there are none."""
    if not (kind := settings.get("hint")):
        return {}
    known = {"kind": kind, "channels": hint_of(kind).channels, "of": "files" if settings["hint_given"] else "pixels"}
    known |= {"range": limits} if (limits := settings.get("hint_range")) else {}
    return {"hint": known | ({"made": dict(sorted(made.items()))} if made else {})}


def bucket_summary(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the summary of pictures says of their buckets (height, width), and of whether the own size of each is beside
    it, by the settings they were packed with."""
    buckets = settings.get("buckets")
    framed = {"framed": True} if buckets or settings.get("keep_sizes") else {}
    return ({"buckets": buckets} if buckets else {}) | framed


def sizes_of(shards: Iterable[ShardInfo]) -> list[Size]:
    """The sizes that shards say their pictures have."""
    return sorted({info.size for info in shards if info.size})


def commonest(shards: Iterable[ShardInfo]) -> Size | None:
    """The size that most pictures have, the lowest of several; None where shards say none."""
    counts: dict[Size, int] = {}
    for info in shards:
        if info.size:
            counts[info.size] = counts.get(info.size, 0) + info.samples
    return min(counts, key=lambda size: (-counts[size], size), default=None)


def is_mixed(summary: Mapping[str, Any]) -> bool:
    """Whether every few shards hold all kinds of samples: by the summary of their index."""
    return summary.get("order") == "mixed" or summary.get("source") in ("shapes", "fashion-mnist")


def pictures_facts(folder: str | Path) -> dict[str, Any]:
    """The hash of the shards of pictures in a folder, or of those that its latents were encoded from; nothing where it
    does not say which."""
    plan = Path(folder) / ENCODING
    index, infos = read_index(folder)
    shards = {info.name: info.sha256 for info in infos} if index["kind"] == "images" else None
    if plan.is_file():
        shards = read_record(plan, {"data": dict})["data"]
    return {"pictures_sha256": sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()} if shards else {}


def noted_pictures(latents: Path) -> str:
    """The pictures that latents were encoded from, by path or address, where that is known and they are there; else
    ""."""
    with suppress(UserError):
        found = str(read_record(latents / ENCODING, {}).get("pictures", ""))
        if found and "://" not in found:
            found = os.path.normpath(latents / found)
            return found if (Path(found) / INDEX).is_file() else ""
        return found
    return ""


def data_facts(folder: str | Path) -> dict[str, Any]:
    """What names the data of a run: the hash of its index."""
    return {"index_sha256": file_sha256(Path(folder) / INDEX)}
