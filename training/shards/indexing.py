"""The index of tars where they lie: those that came from elsewhere, and ours whose index was lost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from training.commands import door
from training.errors import DATA, DISK, UserError
from training.files import file_sha256
from training.guarding import check_output, leads_out, read_record
from training.ledger import Ledger
from training.pictures.formats import FIELDS, choose, several_pictures
from training.progress import Progress
from training.shards.checksums import index_of
from training.shards.claims import claimed
from training.shards.index import (
    ENCODING,
    INDEX,
    PACKING,
    Kind,
    ShardInfo,
    bucket_summary,
    hint_summary,
    read_index,
    write_index,
)
from training.shards.offset_index import index_path, open_index, write_tar_index
from training.shards.splits import split_of
from training.shards.tars import Index
from training.shards.verifying import SHOWN, Keys

LEFT_OUT = {"unsafe": "unsafe member", "duplicate": "duplicate sample key"}  # by the first word of why
SIZED = re.compile(r"-(\d+)x(\d+)-\d+\.tar$")  # the end of a shard's name whose pictures are of one size
MOMENTS = "moments.npy"  # the field that makes a shard one of latents


def latents_summary(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the index of latents says of how they were made, from their encoding's plan."""
    summary = {"mirrored": plan["flip"], **{key: plan[key] for key in ("latent", "encoder", "text_encoder")}}
    further = ("tile", "hint", "image", "vision", "pairs", "buckets", "framed")
    return summary | {key: plan[key] for key in further if plan.get(key)}


def pictures_summary(packing: Mapping[str, Any]) -> dict[str, Any]:
    """What the index of pictures says of how they were packed, from `packing.json`."""
    settings = packing["settings"]
    summary = {"source": packing["source"], "resolution": settings["resolution"]}
    summary |= hint_summary(settings) | bucket_summary(settings)
    return summary | {"order": settings.get("order", "source"), "settings": settings}


def _kept(directory: Path, fields: set[str]) -> tuple[dict[str, Any], Kind]:
    """Summary (without what is made anew) and kind: of the index already there, or, where it cannot be read, of what
    the tars hold and of the file that says what they were made from. Raises UserError for latents without it.

    `made_with` is the ledger of who made the shards; ours is that and more, however often they are indexed.
    """
    kind: Kind = "latents" if MOMENTS in fields else "images"
    try:
        old, _ = read_index(directory)
        if kind == "images" or old["kind"] == kind:
            old = {name: value for name, value in old["summary"].items() if name not in ("counts", "index_notes")}
            ours = any((directory / name).is_file() for name in (ENCODING, PACKING))
            return {"made_with": old.get("ledger", {}) if ours else {}, **old}, kind
    except UserError:
        pass
    name, restored = (ENCODING, latents_summary) if kind == "latents" else (PACKING, pictures_summary)
    try:
        return restored(read_record(directory / name, {})), kind
    except (UserError, LookupError, TypeError, AttributeError):
        if kind == "images":
            return {}, kind
    what = f"{directory}: its tars hold latents, and neither {INDEX} nor {ENCODING} says what made them"
    hint = "encode them again: " + door("encode_latents --autoencoder RUN --data PICTURES --output DIR")
    raise UserError(what, hint=hint, code=DATA)


def _sized(directory: Path, infos: list[ShardInfo]) -> list[ShardInfo]:
    """With the size of each shard's pictures, which its name says. Raises UserError for one that says none."""
    found = {info.name: SIZED.search(info.name) for info in infos}
    if unsaid := [name for name, match in found.items() if not match]:
        what = f"{directory / unsaid[0]}: its pictures are of one bucket, and its name does not say of which"
        raise UserError(what, hint="give it back the name it was written under, as train-48x80-000000.tar", code=DATA)
    return [replace(info, size=(int(match[1]), int(match[2]))) for info in infos if (match := found[info.name])]


def _lacking(directory: Path, infos: list[ShardInfo], ledger: Ledger) -> None:
    """Notes of fields that only some samples have; one format of pictures stands for another."""
    indices = [index_path(directory / info.name) for info in infos]
    names = [open_index(directory / info.name).fields for info in infos]
    fields = {name for fields_here in names for name in fields_here}
    kinds = {field: {field} for field in fields - set(FIELDS)} | {"a picture": fields & set(FIELDS)}
    for kind, alike in sorted((kind, alike) for kind, alike in kinds.items() if alike):
        keys: list[str] = []
        lacking = 0
        for path, fields_here in zip(indices, names, strict=True):
            rows: Index = np.load(path, allow_pickle=False)
            for field in alike.intersection(fields_here):
                rows = rows[rows[field]["offset"] == 0]
            lacking += len(rows)
            keys += [key.decode() for key in rows["key"][: SHOWN - len(keys)].tolist()]
        for key in keys:
            ledger.add("ignored", f"samples without {kind}", key)
        ledger.add("ignored", f"samples without {kind}", count=lacking - len(keys))


def _indexed(tar: Path, keys: Keys, left_out: list[str] | None, others: list[str]) -> Index:
    """A tar's index; samples whose key another tar has are refused, or described in `left_out` and left out."""
    if leads_out(tar):
        raise UserError(f"{tar}: is a link out of its folder", hint="copy the shard itself there", code=DATA)
    try:
        index = index_of(tar, left_out, others)
    except UserError as error:
        if "hard link" in error.what:
            error.hint = f"links are followed where the tars are packed: {_packing(tar.parent)}"
        raise
    seen, repeated = keys.duplicates(index["key"].tolist(), tar.name)
    if repeated:
        if left_out is None:
            hint = f"{_packing(tar.parent)} gives each its own; --on-bad-data skip leaves the later ones out"
            raise UserError(repeated[0], hint=hint, code=DATA)
        left_out += repeated
    if all(seen):
        raise UserError(f"{tar}: all its samples are in other tars", code=DATA)
    kept: Index = index[~np.array(seen)]
    return kept


def _packing(directory: Path) -> str:
    """The command that reads what cannot be indexed in place."""
    return f"{door('make_shards pack', f'{directory}/*.tar')} --output OTHER"


def _split(tar: Path, ledger: Ledger) -> str:
    """What the tar's name states, else `train`."""
    split = split_of(tar.stem)
    if split is None:
        ledger.add("guessed", "no split in the name of the tar, train", tar.name)
    return split or "train"


def index_folder(directory: str | Path, *, skip: bool = False) -> list[ShardInfo]:
    """Indexes the tars of a folder where they lie: an offset index beside each, and `index.json`.

    The split is what the file name states in any of its parts, else train. A summary already there is kept; its
    `ledger` says what was left out, guessed and ignored. Raises UserError(code 3) where there are no tars, one is not
    sound, or a key occurs twice; `skip` leaves such tars and samples out instead. Code 4 where another process writes
    there, code 6 where nothing can be written.
    """
    directory = Path(directory)
    tars = sorted(path for path in directory.glob("*.tar") if not path.name.startswith("."))
    if not tars:
        raise UserError(f"{directory}: no tars in this folder", hint="expected files such as 00000.tar", code=DATA)
    try:
        check_output(directory)
    except UserError as error:
        hint = "indices are written beside the tars: copy these to a disk that can be written"
        raise UserError(error.what, hint=hint, code=DISK) from None
    with claimed(directory, "wait for it"):
        return _index(directory, tars, skip)


def _index(directory: Path, tars: list[Path], skip: bool) -> list[ShardInfo]:
    infos: list[ShardInfo] = []
    fields: set[str] = set()
    keys, ledger = Keys(directory), Ledger()
    for tar in Progress("indexing", len(tars), "tar").each(tars, lambda tar: 1):
        left_out: list[str] = []
        others: list[str] = []
        try:
            index = _indexed(tar, keys, left_out if skip else None, others)
            split = _split(tar, ledger)
        except UserError as error:
            if not skip:
                raise
            ledger.add("left out", "tar that cannot be used", error.what)
            continue
        for why in left_out:
            ledger.add("left out", LEFT_OUT.get(why.split()[0], "sample with a field 'key'"), f"{tar.name}: {why}")
        for name in others:
            ledger.add("ignored", "file of a tar that belongs to no sample", f"{tar.name}: {name}")
        write_tar_index(tar, index)
        fields.update((index.dtype.names or ())[1:])
        infos.append(ShardInfo(tar.name, split, len(index), tar.stat().st_size, file_sha256(tar)))
    for path in sorted(directory.glob(".*.tar")):
        ledger.add("ignored", "hidden tar", path.name)
    if not infos:
        raise UserError(f"{directory}: no sound tars ({'; '.join(ledger.lines())})", code=DATA)
    summary, kind = _kept(directory, fields)
    infos = _sized(directory, infos) if summary.get("buckets") else infos
    if kind == "images":
        _check_pictures(directory, infos, fields)
    _lacking(directory, infos, ledger)
    with suppress(LookupError, TypeError, AttributeError):  # a ledger that somebody wrote by hand
        ledger.merge(summary.get("made_with", {}))
    write_index(directory, infos, {**summary, "ledger": ledger.report()}, kind)
    return infos


def _check_pictures(directory: Path, infos: list[ShardInfo], fields: set[str]) -> None:
    """Raises UserError(code 3) where no field is a picture that training reads, as where names are full of dots: their
    field is all after the first one; or where a sample has several."""
    pictures = [field for field in FIELDS if field in fields]
    if not pictures:
        hiding = sorted(field for field in fields if field.rpartition(".")[2] in FIELDS)
        hint = f"read are: {', '.join(FIELDS)}"
        if hiding:
            hint = f"a key ends at the first dot of a name here; {_packing(directory)} reads the names as they are"
        have = ", ".join((hiding or sorted(fields))[:4])
        what = f"{directory}: no field of these tars is a picture (they have: {have})"
        raise UserError(what, hint=hint, code=DATA)
    for tar in [directory / info.name for info in infos]:
        rows: Index = np.load(index_path(tar), allow_pickle=False)
        here = [field for field in pictures if field in (rows.dtype.names or ())]
        for row in rows[sum((rows[field]["offset"] > 0).astype(int) for field in here) > 1][:1] if here else []:
            found = [field for field in here if row[field]["offset"]]
            what = f"{tar}: sample {row['key'].decode()}: {several_pictures(found)}"
            raise UserError(what, hint=choose(directory, found), code=DATA)
