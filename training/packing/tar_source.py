"""Existing webdataset tars as a source, compressed ones too."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from training.errors import DATA, UserError
from training.messages import printable
from training.packing.archives import Tar, Unpacked, open_tar, stored
from training.packing.arrow import labels
from training.packing.folder import EACH, Folder
from training.packing.metadata import is_metadata
from training.packing.sources import Reading, Remark, Sample, Source, safe_key
from training.packing.split_folders import Taken, split_folders, split_of
from training.packing.texts import LARGEST_TEXT, PASSED_OVER, STATED, passed_over, several_lines, split_in
from training.packing.trees import is_hidden
from training.pictures.decoding import SUFFIXES, refuse
from training.shards.captions import (
    TEXT_FIELDS,
    captions_in,
    captions_of,
    clean_captions,
    decode_text,
    record_of,
    text_fields,
    texts_of,
    without_captions,
)
from training.shards.index import SPLITS
from training.shards.opened import Bytes
from training.shards.tars import Member, walk_tar

Place = tuple[int, int]  # offset and size
Group = dict[str, Place]  # field -> place
NAME = re.compile(r"((?:[^/]+/)*[^./][^./]*)\.([^/]+)")


def is_picture(field: str) -> bool:
    """Whether a field holds a picture, by its last suffix."""
    return f".{field}".endswith(SUFFIXES)


def _part(key: str, group: Group) -> dict[str, Group]:
    """A group by the key up to its first dot, as webdataset has it; or, where the dots are part of the names
    (`Shot at 10.15.30.png`), by the whole names: no member is plain `KEY.FIELD` then."""
    if any("." not in field for field in group):
        return {key: group}
    parts: dict[str, Group] = {}
    for field, place in group.items():
        middle, _, suffix = field.rpartition(".")
        owner, _, last = middle.rpartition(".")
        if suffix in TEXT_FIELDS and middle in group and is_picture(middle) and owner:  # NAME.png.txt
            middle, suffix = owner, f"{last}.{suffix}"
        parts.setdefault(f"{key}.{middle}", {})[suffix] = place
    return parts


def _are_fields(groups: dict[str, Group]) -> bool:
    """Whether dotted names are fields: the same two or more pictures under every key."""
    dotted = [{f for f in group if is_picture(f)} for group in groups.values() if all("." in f for f in group)]
    return len(dotted) > 1 and len(dotted[0]) > 1 and all(fields == dotted[0] for fields in dotted)


def group_members(members: list[Member], left_out: list[str]) -> dict[str, Group]:
    """Samples by key, in order of first appearance; members of a sample need not stand together. A field given twice
    is described in `left_out`."""
    groups: dict[str, Group] = {}
    for name, offset, size in members:
        if not is_hidden(name) and (match := NAME.fullmatch(name)):
            key, field = match[1], match[2].lower()
            if groups.setdefault(key, {}).setdefault(field, (offset, size)) != (offset, size):
                left_out.append(f"duplicate sample key {key} ({field} twice)")
    if _are_fields(groups):
        return groups
    return {whole: part for key, group in groups.items() for whole, part in _part(key, group).items()}


class Tars(Source):
    """Webdataset tars: a picture, `txt` or `caption` (a line each), and `json` per key (img2dataset's layout, and our
    own); one that holds a metadata file is read as the folder it was made of. Splits by the names of tars and folders.

    A damaged tar is left out whole, with a remark; of a sound one, members that are unsafe or of no use. A key that
    another tar has is made unique by its own tar's name.
    """

    def __init__(self, paths: list[Path], reading: Reading | None = None) -> None:
        self.paths, self.reading = paths, reading or Reading()
        self.name = f"{len(paths)} tars" if len(paths) > 1 else str(paths[0])
        self._labels = dict(zip(paths, labels(paths), strict=True))
        named = self.reading.splits == "names"
        self._homes = split_folders(label.rpartition("/")[0] for label in self._labels.values()) if named else {}

    def state(self) -> str:
        """A hash of names, sizes and times of the tars."""
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return hashlib.sha256(repr(stats).encode("utf-8", "replace")).hexdigest()

    def samples(self) -> Iterator[Sample | Remark]:
        """The samples of each tar in its order; remarks for tars, members and samples that cannot be used."""
        home: dict[str, str] = {}
        for path in self.paths:
            left_out: list[str] = []
            try:
                data = open_tar(path)
            except UserError as error:
                yield self._damaged(path, error)
                continue
            with closing(data):
                try:
                    members = list(walk_tar(path, left_out, data, hard_links=True))
                except UserError as error:
                    yield self._damaged(path, error)
                    continue
                for item in self._items(path, data, members, left_out):
                    yield from self._owned(item, path, home)

    @staticmethod
    def _damaged(path: Path, error: UserError) -> Remark:
        return Remark(path.name, f"damaged tar ({error.what.removeprefix(f'{path}: ')})")

    def _owned(self, item: Sample | Remark, path: Path, home: dict[str, str]) -> Iterator[Sample | Remark]:
        """The item, its key told from that of a sample in another tar: both downloads may count from zero."""
        if isinstance(item, Sample):
            label, key = safe_key(self._labels[path]), item.key
            if key in home:
                key = f"{label}/{key}"
                why = f"key of another sample too (in {home[item.key]})"
                yield Remark(f"{item.key} = {key}", f"{why}, made unique", "replaced")
            while key in home:
                key += "_"
            home[key] = label
            item = replace(item, key=key)
        yield item

    def _split(self, path: Path) -> Taken | None:
        """The split of a tar, by its own name or a folder's, and what said so."""
        if self.reading.splits == "draw":
            return None
        label = self._labels[path]
        split = split_of(path.name.split(".tar")[0])
        return (split, path.name) if split else self._homes.get(label.rpartition("/")[0])

    def _items(
        self, path: Path, data: Bytes, members: list[Member], left_out: list[str]
    ) -> Iterator[Sample | Remark]:
        taken = self._split(path)
        if taken and path.name.split("-")[0] not in SPLITS:
            yield Remark(printable(f"{taken[1]} = {taken[0]}"), "split taken from a tar's name or folder", "guessed")
        split = taken[0] if taken else None
        if isinstance(data, Unpacked):
            data.keep(members)
        if any(is_metadata(member.name.rpartition("/")[2]) for member in members):
            yield from (Remark(path.name, f"unusable member ({why})") for why in left_out)
            folder = Folder(Tar(path, members, data), self.reading)
            for item in folder.samples():
                yield replace(item, split=item.split or split) if isinstance(item, Sample) else item
            return
        groups = group_members(members, left_out)
        yield from (Remark(path.name, f"unusable member ({why})") for why in left_out)
        yield from self._passed(path, members)
        if not groups:
            yield Remark(path.name, "tar without samples (files named KEY.FIELD such as 000001.jpg)")
        named = self.reading.splits == "names" and not split
        homes = split_folders(key.rpartition("/")[0] for key in groups) if named else {}
        for home, (inner, part) in sorted(homes.items()):
            where = printable(f"{path.name}/{part or home} = {inner}")
            yield Remark(where, "split taken from a folder's name", "guessed")
        for key, group in groups.items():
            yield from self._sample(data, path, key, group, homes.get(key.rpartition("/")[0], (split, ""))[0])

    @staticmethod
    def _passed(path: Path, members: list[Member]) -> Iterator[Remark]:
        hidden = [member.name for member in members if is_hidden(member.name)]
        bare = [member.name for member in members if not is_hidden(member.name) and not NAME.fullmatch(member.name)]
        for why, names in (("hidden file or folder", hidden), ("file of no sample", bare)):
            if names:
                yield Remark(printable(f"{path.name}/{names[0]}"), why, "ignored", len(names))

    def _picture(self, path: Path, key: str, group: Group) -> str | None:
        """The field of the picture. Raises UserError(code 3) where there are several and none is chosen."""
        found, wanted = [field for field in group if is_picture(field)], self.reading.image_field
        if wanted:
            return wanted.lower().removeprefix(".") if wanted.lower().removeprefix(".") in group else None
        if len(found) > 1:
            hint = "name the one to train on: " + " or ".join(f"--image-field {field}" for field in sorted(found))
            what = f"{path.name}: sample {key} has {len(found)} pictures ({', '.join(sorted(found))})"
            raise UserError(what, hint=hint, code=DATA)
        return found[0] if found else None

    def _sample(
        self, data: Bytes, path: Path, key: str, group: Group, split: str | None
    ) -> Iterator[Sample | Remark]:
        def read(field: str) -> bytes:
            offset, size = group[field]
            if size > LARGEST_TEXT:
                raise refuse(f"{field} too large ({size:,} bytes; at most {LARGEST_TEXT:,} are read)")
            return data.read(size, offset)

        picture = self._picture(path, key, group)
        if picture is None:
            wanted = f" in the field {self.reading.image_field}" if self.reading.image_field else ""
            yield Remark(key, f"no image{wanted} (it has: {', '.join(group)})")
            return
        beside = text_fields(group)
        for field in sorted(group.keys() - {picture, "json", *beside}):
            yield Remark(key, f"field {field}", "ignored")
        try:
            image = stored(path, data, *group[picture], picture)
            record = record_of(read("json")) if "json" in group else {}
            if column := self.reading.caption_column:
                captions = clean_captions(captions_in(record, column))
            else:
                texts = [decode_text(read(field)) for field in beside]
                if self.reading.caption_lines == "each" and any(map(several_lines, texts)):
                    yield Remark(key, EACH, "guessed")
                listed = [line for text in texts for line in texts_of(text, self.reading.caption_lines)]
                captions = captions_of(record, listed)
                if passed_over(captions_in(record), captions):
                    yield Remark(key, PASSED_OVER, "ignored")
        except UserError as error:
            yield Remark(key, error.what)
        else:
            strings = [name for name, value in record.items() if isinstance(value, str)] if not captions else []
            hint = " or ".join(f"--caption-column {name}" for name in strings[:4])
            suffix = f".{picture.rpartition('.')[2]}"
            if self.reading.splits == "names" and (stated := split_in(record)):
                yield Remark(key, STATED, "guessed")
                split = stated
            yield Sample(safe_key(key), image, captions, without_captions(record), split, suffix, hint)
