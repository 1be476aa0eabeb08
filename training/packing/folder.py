"""A folder of pictures, or an archive of one, as a source."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.errors import DATA, UserError
from training.messages import printable
from training.packing.metadata import Metadata, Record
from training.packing.sources import Reading, Remark, Sample, Source, safe_key
from training.packing.split_folders import Taken, split_folders
from training.packing.tables import FILE_COLUMNS, TABLES
from training.packing.texts import (
    LARGEST_TEXT,
    PASSED_OVER,
    STATED,
    TEXTS,
    is_download,
    passed_over,
    several_lines,
    split_in,
)
from training.packing.trees import Directory, Tree
from training.pictures.decoding import SUFFIXES
from training.pictures.formats import unused
from training.shards.captions import (
    as_list,
    captions_in,
    clean_captions,
    decode_text,
    plain_name,
    record_of,
    texts_of,
    without_captions,
)

ARCHIVES = (".tar", ".zip", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".parquet", ".arrow")
EACH = "several lines in a caption file, each a caption of its own; --caption-lines join makes them one"


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


class Folder(Source):
    """A folder of pictures, searched through, or an archive of one. Captions: `NAME.txt` or `NAME.caption` in any case
    (a line each), else the rows of `metadata.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`, else `NAME.json`.

    A row names `file_name` and `text`; a picture may have many rows, and a list of captions in each; other columns are
    kept. Folders named after splits are those splits.
    """

    def __init__(self, where: Path | Tree, reading: Reading | None = None) -> None:
        self.tree, self.reading = where if isinstance(where, Tree) else Directory(where), reading or Reading()
        self.name = self.tree.name
        self._pictures = [name for name in self.tree.files if _suffix(name) in SUFFIXES]
        if not self._pictures:
            raise UserError(f"{self.name}: no images in this folder", hint=self._instead(), code=DATA)
        self._others: list[str] = []  # pictures of other formats than the one asked for
        self._choose()
        self.total = len(self._pictures)
        self._sidecars: dict[str, list[str]] = defaultdict(list)
        for name in self.tree.files:
            if _suffix(name) in (*TEXTS, ".json"):
                self._sidecars[_stem(name)].append(name)
                self._sidecars["~" + _stem(name).casefold()].append(name)

    def _choose(self) -> None:
        """Keeps the pictures of one format, where that is asked for. Raises UserError(code 3) where most come in
        several and none is chosen: a photo and its mask, say."""
        formats: dict[str, set[str]] = defaultdict(set)
        for name in self._pictures:
            formats[_stem(name)].add(_suffix(name)[1:])
        twice = [found for found in formats.values() if len(found) > 1]
        named = sorted(set().union(*(twice or formats.values())))
        if wanted := self.reading.image_field:
            suffix = f".{wanted.lower().removeprefix('.')}"
            self._others = [name for name in self._pictures if _suffix(name) != suffix]
            self._pictures = [name for name in self._pictures if _suffix(name) == suffix]
            if not self._pictures:
                what = f"--image-field {wanted}: no picture of {self.name} ends in {suffix}"
                raise UserError(what, hint=f"they end in {', '.join(named)}", code=DATA)
        elif len(twice) > 1 and 2 * len(twice) >= len(formats):
            what = f"{self.name}: {len(twice):,} of {len(formats):,} pictures are there twice ({', '.join(named)})"
            hint = " or ".join(f"--image-field {field}" for field in named)
            apart = "where they are different pictures, put each format into a folder of its own"
            raise UserError(what, hint=f"name the one to train on: {hint}; {apart}", code=DATA)

    def _chosen_remarks(self) -> Iterator[Remark]:
        chosen = {_stem(name) for name in self._pictures}
        for name in self._others:
            if _stem(name) in chosen:
                yield Remark(printable(name), "picture of another format than --image-field", "ignored")
            else:
                yield Remark(printable(name), f"no picture of the format {self.reading.image_field}")

    def _instead(self) -> str:
        """What to do with a folder that holds no picture by its own name."""
        found = Counter(_suffix(name) for name in self.tree.files if _suffix(name) in ARCHIVES)
        if found and self.tree.root:
            suffix = next(suffix for suffix in ARCHIVES if found[suffix])
            homes = sorted({posixpath.dirname(name) for name in self.tree.files if _suffix(name) == suffix})
            if len(homes) > 1:
                homes = sorted({re.sub("[^/]+", "*", home) for home in homes})
            patterns = (shlex.quote(posixpath.join(self.name, home, f"*{suffix}")) for home in homes)
            return f"archives and shards are named with a star: {' '.join(patterns)}"
        for name in self.tree.files:
            if why := unused(name, self.tree.head(name)):
                return f"{name}: {why}"
        return f"looked for files ending in {', '.join(SUFFIXES[:4])}, …"

    def state(self) -> str:
        """That of all files."""
        return self.tree.state()

    def samples(self) -> Iterator[Sample | Remark]:
        """A sample per picture, in order of paths; then remarks for the files that belong to none."""
        yield from self.tree.passed
        yield from self._chosen_remarks()
        every = [*self._pictures, *self._others]
        stems = {stem for name in every for stem in (_stem(name), name)}
        tables = [name for name in self.tree.files if _suffix(name) in TABLES and _stem(name) not in stems]
        tables += [name for name in self.tree.files if _suffix(name) == ".txt" and self._is_listing(name, stems)]
        metadata = Metadata(self.tree, every, tables, self.reading)
        yield from metadata.remarks
        self._check_column(metadata)
        splits = split_folders(map(posixpath.dirname, self._pictures)) if self.reading.splits == "names" else {}
        yield from self._split_remarks(splits)
        keys: set[str] = set()
        used = set(metadata.tables)
        for name in self._pictures:
            key = safe_key(_stem(name))
            if not name.isprintable():
                yield Remark(printable(name), f"name that cannot be shown (packed as {key})", "replaced")
            if key in keys:
                key = f"{key}_{_suffix(name)[1:]}"
                why = f"same name as another picture (packed as {key})"
                yield Remark(printable(name), why, "replaced")
                while key in keys:
                    key += "_"
            keys.add(key)
            beside = self._beside(name)
            used.update(beside)
            split = splits.get(posixpath.dirname(name), (None, ""))[0]
            yield from self._sample(name, key, beside, metadata, split)
        yield from self._left(used, metadata)

    def _is_listing(self, name: str, stems: set[str]) -> bool:
        """Whether a text file that belongs to no picture starts as a table of captions does."""
        if _stem(name) in stems or self.tree.files[name] > LARGEST_TEXT * 16:
            return False
        first = re.split(r"[,;\t|\r\n]", self.tree.head(name).decode("utf-8", "replace"))[0]
        return plain_name(first.strip('"\ufeff')) in FILE_COLUMNS

    def _check_column(self, metadata: Metadata) -> None:
        column, there = self.reading.caption_column, metadata.columns
        elsewhere = any(_suffix(name) == ".json" for names in self._sidecars.values() for name in names)
        if column and plain_name(column) not in map(plain_name, there) and (there or not elsewhere):
            hint = f"the columns are {', '.join(there)}" if there else "no table names any of the pictures"
            raise UserError(f"--caption-column {column}: no such column in {self.name}", hint=hint, code=DATA)

    def _split_remarks(self, splits: dict[str, Taken]) -> Iterator[Remark]:
        counts = Counter(splits.get(posixpath.dirname(name)) for name in self._pictures)
        for taken, count in sorted((taken, count) for taken, count in counts.items() if taken):
            split, folder = taken
            yield Remark(printable(f"{folder} = {split}"), "split taken from a folder's name", "guessed", count)
        if splits and counts[None]:
            yield Remark("", "split of folders that name none, drawn", "guessed", counts[None])

    def _beside(self, name: str) -> list[str]:
        """The caption files of a picture, `.txt` first: NAME.txt, or NAME.png.txt."""
        stems = (_stem(name), name)
        found = [file for stem in stems for file in self._sidecars.get(stem, ())]
        if not found:  # spelled with other capitals, where no other file could be meant
            found = [file for stem in stems for file in self._sidecars.get("~" + stem.casefold(), ())]
            found = found if len(found) == 1 else []
        return sorted(dict.fromkeys(found), key=lambda file: (*TEXTS, ".json").index(_suffix(file)))

    def _sample(
        self, name: str, key: str, beside: list[str], metadata: Metadata, split: str | None
    ) -> Iterator[Sample | Remark]:
        record, column = metadata.records.get(name, Record()), self.reading.caption_column
        try:
            texts: list[object] = []
            files = [] if column else [file for file in beside if _suffix(file) in TEXTS]
            for file in files:
                text = decode_text(self.tree.text(file, LARGEST_TEXT))
                if self.reading.caption_lines == "each" and several_lines(text):
                    yield Remark(key, EACH, "guessed")
                texts += texts_of(text, self.reading.caption_lines)
            if len(files) > 1:
                yield Remark(key, "several caption files, all taken", "guessed")
            captions, meta = clean_captions(texts) or clean_captions(record.captions), dict(record.meta)
            others = [*record.captions]
            for file in [file for file in beside if _suffix(file) == ".json"]:
                try:
                    more, about = self._json(file)
                except UserError as error:
                    if not captions:
                        raise
                    more, about = [], {}
                    yield Remark(printable(file), f"sidecar that cannot be read ({error.what})", "ignored")
                captions, meta = captions or clean_captions(more), {**about, **meta}
                others += more
                if not (more or about):
                    yield Remark(printable(file), "sidecar without a caption", "ignored")
            if passed_over(others, captions):
                yield Remark(key, PASSED_OVER, "ignored")
            image = self.tree.picture(name)
        except UserError as error:
            yield Remark(key, error.what)
            return
        if self.reading.splits == "names" and (stated := split_in(meta)):
            yield Remark(key, STATED, "guessed")
            split = stated
        hint = "" if captions else self._hint(record, metadata)
        yield Sample(key, image, captions, meta, split, posixpath.splitext(name)[1], hint)

    def _json(self, file: str) -> tuple[list[object], dict[str, Any]]:
        """Captions and other facts of a NAME.json; none where it says no caption, as the files of other programs, but
        for img2dataset's."""
        record = record_of(self.tree.text(file, LARGEST_TEXT))
        captions = captions_in(record, self.reading.caption_column)
        return captions, without_captions(record) if captions or is_download(record) else {}

    def _hint(self, record: Record, metadata: Metadata) -> str:
        """Where the caption of a picture without one may be."""
        columns = [name for name, value in record.meta.items() if any(isinstance(v, str) for v in as_list(value))]
        if columns:
            flags = " or ".join(f"--caption-column {shlex.quote(name)}" for name in columns[:4])
            return f"its metadata have no column text; {flags} reads another"
        if metadata.needing:
            return f"{printable(metadata.needing)} is read after: pip install pyarrow"
        if metadata.unread:
            names = ", ".join(map(printable, metadata.unread[:3]))
            return f"{names} beside it names no picture here, and was not read; metadata.csv with file_name,text is"
        return ""

    def _left(self, used: set[str], metadata: Metadata) -> Iterator[Remark]:
        """Remarks on the files that are neither pictures nor were read."""
        unread = set(metadata.unread)
        for name in self.tree.files:
            suffix, shown = _suffix(name), printable(name)
            if suffix in SUFFIXES or name in used:
                continue
            if why := unused(name, self.tree.head(name)):
                yield Remark(shown, why)
            elif name in unread:
                yield Remark(shown, "table that was not read", "ignored")
            elif suffix in TEXTS:
                yield Remark(shown, "caption without image", "ignored")
            elif suffix in ARCHIVES:
                yield Remark(shown, "archive beside the pictures, not read", "ignored")
            else:
                yield Remark(shown, "neither picture nor caption", "ignored")
