"""Where captioned pictures come from: each source yields `Sample`s in a fixed order, and a `Remark` for everything it
had to leave out.

Adding a source: a class with `name`, `total`, `state()` and `samples()`, and a line in
`training.packing_cli.find_source`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from training.errors import DATA, UserError
from training.ledger import Effect
from training.pictures.decoding import ELSEWHERE, LARGEST_FILE, SUFFIXES, read_file, refuse
from training.shards.captions import clean_captions, decode_text
from training.shards.index import SPLITS
from training.shards.tars import Index, index_tar

METADATA = ("metadata.jsonl", "metadata.csv")
LARGEST_TEXT = 4 << 20  # bytes of one picture's captions or metadata


@dataclass(frozen=True)
class Sample:
    """One captioned picture. `image` is decoded or the file's bytes; no captions: none was found; `split` None: not
    decided."""

    key: str
    image: Image.Image | bytes
    captions: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    suffix: str = ""  # of the picture's file, which is named key + suffix where it is refused


@dataclass(frozen=True)
class Remark:
    """Something to report about a key, as the ledger names it: a sample that cannot be used, or what else was done."""

    key: str
    reason: str
    effect: Effect = "left out"


class Source(ABC):
    """`name` for messages; `total` pictures where known; `exact`: pictures are made at the wanted size, captions speak
    of left and right."""

    name: str
    total: int | None = None
    exact: bool = False
    mixed: bool = False  # its order is random already

    @abstractmethod
    def state(self) -> str:
        """A fingerprint of the content, cheap: another state means another packing."""

    @abstractmethod
    def samples(self) -> Iterator[Sample | Remark]:
        """All samples, in an order that depends on the content alone."""


def safe_key(path: str) -> str:
    """A webdataset key from a relative path without suffix: dots, backslashes and unprintable characters of the parts
    become `_`."""
    parts = [re.sub(r"[.\\]", "_", part) for part in path.split("/")]
    return "".join(letter if letter.isprintable() else "_" for letter in "/".join(parts))


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _captions_of(record: dict[str, Any]) -> list[object]:
    """The captions a metadata record holds under the names in use."""
    return next((_as_list(record[name]) for name in ("captions", "text", "caption") if record.get(name)), [])


class Folder(Source):
    """A folder of pictures, searched through: captions from `NAME.txt` (a line each) or the folder's `metadata.jsonl` /
    `metadata.csv`.

    A metadata row names `file_name` and `text` (a list for several captions); its other columns are kept. Hidden files
    and linked folders are passed over.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)
        self._files = self._walk()
        self._pictures = [path for path in self._files if path.suffix.lower() in SUFFIXES]
        if not self._pictures:
            hint = f"looked for files ending in {', '.join(SUFFIXES[:4])}, …"
            if any(path.suffix.lower() == ".tar" for path in self._files):
                hint = f"shards are named with a star: '{root}/*.tar'"
            raise UserError(f"{root}: no images in this folder", hint=hint, code=DATA)
        self.total = len(self._pictures)

    def _walk(self) -> list[Path]:
        files = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            files += [Path(folder, name) for name in names if not name.startswith(".")]
        return sorted(files, key=lambda path: path.relative_to(self.root).as_posix())

    def state(self) -> str:
        """A hash of names, sizes and times of all files."""
        digest = hashlib.sha256()
        for path in self._files:
            stat = path.lstat()
            digest.update(
                f"{path.relative_to(self.root).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(
                    "utf-8", "replace"
                )
            )
        return digest.hexdigest()

    def samples(self) -> Iterator[Sample | Remark]:
        """A sample per picture, in order of paths; then remarks for the files that belong to none."""
        present = {path: path.relative_to(self.root).as_posix() for path in self._files}
        records, remarks = self._metadata(present)
        yield from remarks
        keys: set[str] = set()
        for path in self._pictures:
            name = present[path]
            key = safe_key(name[: -len(path.suffix)])
            if key in keys:
                yield Remark(
                    name, f"same name as another picture (packed as {key}_{path.suffix[1:].lower()})", "replaced"
                )
                key = f"{key}_{path.suffix[1:].lower()}"
                while key in keys:
                    key += "_"
            keys.add(key)
            yield self._sample(path, key, records.get(path))
        for path in self._files:
            suffix = path.suffix.lower()
            if suffix in ELSEWHERE:
                yield Remark(present[path], ELSEWHERE[suffix])
            elif suffix == ".txt" and safe_key(present[path][:-4]) not in keys:
                yield Remark(present[path], "caption without image", "ignored")
            elif suffix not in SUFFIXES and suffix != ".txt" and path.name not in METADATA:
                yield Remark(present[path], "neither picture nor caption", "ignored")

    def _sample(self, path: Path, key: str, record: dict[str, Any] | None) -> Sample | Remark:
        sidecar = path.with_suffix(".txt")
        try:
            text = decode_text(read_file(sidecar, LARGEST_TEXT)) if sidecar.is_file() else ""
            captions = clean_captions(text.splitlines()) or clean_captions(_captions_of(record or {}))
            image = read_file(path, LARGEST_FILE)
        except UserError as error:
            return Remark(key, error.what)
        meta = {
            name: value
            for name, value in (record or {}).items()
            if name not in ("file_name", "text", "caption", "captions")
        }
        return Sample(key, image, captions, meta, suffix=path.suffix)

    def _metadata(self, present: dict[Path, str]) -> tuple[dict[Path, dict[str, Any]], list[Remark]]:
        """The metadata rows by picture, and remarks on rows that name none."""
        records: dict[Path, dict[str, Any]] = {}
        remarks = []
        for path in self._files:
            if path.name not in METADATA:
                continue
            for number, row in enumerate(_rows(path), 1):
                name = row.get("file_name")
                if not isinstance(name, str):
                    what = f"{path}: row {number} has no 'file_name'"
                    raise UserError(what, hint="each row needs file_name and text", code=DATA)
                target = path.parent / name
                if target in present:
                    records[target] = row
                else:
                    remarks.append(Remark(name, f"listed in {path.name} but not there"))
        return records, remarks


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = decode_text(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path}: {error.what}", hint=error.hint, code=DATA) from None
    if path.suffix == ".csv":
        try:
            for row in csv.DictReader(io.StringIO(text, newline="")):
                yield {name: value for name, value in row.items() if isinstance(name, str)}
        except csv.Error as error:
            raise UserError(f"{path}: not readable as CSV ({error})", code=DATA) from None
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is not JSON ({error})", code=DATA) from None
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} is not a JSON object", code=DATA)
            yield row


class Tars(Source):
    """Existing webdataset tars: a picture, `txt` and `json` per key (img2dataset's layout, and our own). Splits by
    name: `train-…tar`.

    A damaged tar is left out whole, with a remark; of a sound one, members that are unsafe or of no use.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.name = paths, f"{len(paths)} tars" if len(paths) > 1 else str(paths[0])

    def state(self) -> str:
        """A hash of names, sizes and times of the tars."""
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return hashlib.sha256(repr(stats).encode()).hexdigest()

    def samples(self) -> Iterator[Sample | Remark]:
        """The samples of each tar in its order; remarks for tars, members and samples that cannot be used."""
        home: dict[str, str] = {}
        for path in self.paths:
            left_out: list[str] = []
            try:
                index = index_tar(path, left_out)
            except UserError as error:
                yield Remark(path.name, f"damaged tar ({error.what.removeprefix(f'{path}: ')})")
                continue
            yield from (Remark(path.name, f"unusable member ({why})") for why in left_out)
            yield from self._rows(path, index, home)

    def _rows(self, path: Path, index: Index, home: dict[str, str]) -> Iterator[Sample | Remark]:
        fields = (index.dtype.names or ())[1:]
        prefix = path.name.split("-")[0]
        split = prefix if prefix in SPLITS else None
        with path.open("rb") as file:
            for row in index:
                key = row["key"].decode()
                if key in home:
                    yield Remark(key, f"duplicate sample key ({home[key]}, {path.name})")
                    continue
                home[key] = path.name
                places = {name: row[name].item() for name in fields if row[name]["offset"]}
                picture = next((suffix[1:] for suffix in SUFFIXES if suffix[1:] in places), None)
                if picture is None:
                    yield Remark(key, f"no image (it has: {', '.join(places)})")
                    continue
                for name in sorted(places.keys() - {picture, "txt", "json"}):
                    yield Remark(key, f"field {name}", "ignored")
                yield self._sample(file.fileno(), key, places, picture, split)

    def _sample(
        self, descriptor: int, key: str, places: dict[str, tuple[int, int]], picture: str, split: str | None
    ) -> Sample | Remark:
        def data(name: str, limit: int = LARGEST_TEXT) -> bytes:
            offset, size = places[name]
            if size > limit:
                raise refuse(f"{name} too large ({size:,} bytes; at most {limit:,} are read)")
            return os.pread(descriptor, size, offset)

        try:
            image = data(picture, LARGEST_FILE)
            record = json.loads(data("json")) if "json" in places else {}
            record = record if isinstance(record, dict) else {"json": record}
            captions = clean_captions(
                [*_as_list(record.get("captions")), *(decode_text(data(name)) for name in places if name == "txt")]
            )
            captions = captions or clean_captions(_captions_of(record))
        except UserError as error:
            return Remark(key, error.what)
        except (ValueError, RecursionError):
            return Remark(key, "metadata not JSON")
        meta = {name: value for name, value in record.items() if name not in ("captions", "caption", "text")}
        return Sample(safe_key(key), image, captions, meta, split, f".{picture}")
