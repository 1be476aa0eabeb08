"""Parquet files and folders that Hugging Face's `save_to_disk` wrote, as a source. Needs the package pyarrow."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.errors import DATA, UserError
from training.messages import printable
from training.packing.sources import Reading, Remark, Sample, Source, safe_key
from training.packing.split_folders import split_folders, split_of
from training.packing.texts import STATED, failed, is_download, split_in
from training.packing.trees import file_state
from training.pictures.decoding import LARGEST_FILE, SUFFIXES
from training.shards.captions import COLUMNS, captions_in, clean_captions, plain_name, without_captions

NAMES = (".parquet", ".arrow")
STATE = "state.json"  # in each folder that save_to_disk wrote
BATCH = 32  # rows read at once: each holds a picture's file


def arrow(where: str) -> Any:
    """The package pyarrow. Raises UserError(code 3) where it is not installed."""
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError:
        what = f"{where}: parquet and arrow files need pyarrow"
        raise UserError(what, hint="pip install pyarrow", code=DATA) from None


def saved_files(folder: Path) -> list[Path]:
    """The arrow files of a data set, or of its splits in a folder each, that save_to_disk wrote; else none."""
    several = (folder / "dataset_dict.json").is_file()
    homes = sorted(path.parent for path in folder.glob(f"*/{STATE}")) if several else [folder]
    return [path for home in homes if (home / STATE).is_file() for path in sorted(home.glob("data-*.arrow"))]


class Arrow(Source):
    """Rows of parquet or arrow files: a picture as bytes, or as `{bytes, path}` of Hugging Face's Image; captions in
    `text` or `caption`; other columns that JSON can hold are kept. Splits by the names of files and folders."""

    def __init__(self, paths: list[Path], reading: Reading) -> None:
        self.paths, self.reading, self.name = paths, reading, str(paths[0])
        if len(paths) > 1:
            self.name = f"{len(paths)} {paths[0].suffix[1:]} files"
        self.arrow = arrow(str(paths[0]))

    def state(self) -> str:
        """A hash of names, sizes and times."""
        return hashlib.sha256(repr([file_state(path) for path in self.paths]).encode()).hexdigest()

    def samples(self) -> Iterator[Sample | Remark]:
        """The rows of each file in its order."""
        folders = dict(zip(self.paths, labels(self.paths), strict=True))
        named = self.reading.splits == "names"
        homes = split_folders(label.rpartition("/")[0] for label in folders.values()) if named else {}
        taken: set[str] = set()  # labels as keys have them: a.b and a_b are the same there
        for path, label in folders.items():
            home = safe_key(label)
            while home in taken:
                home += "_"
            taken.add(home)
            split = (split_of(path.stem) or homes.get(label.rpartition("/")[0], (None, ""))[0]) if named else None
            if split:
                yield Remark(printable(f"{label} = {split}"), "split taken from a file's or folder's name", "guessed")
            yield from self._rows(path, home, split)

    def _batches(self, path: Path) -> tuple[Any, Iterator[Any]]:
        if path.suffix.lower() == ".parquet":
            file = self.arrow.parquet.ParquetFile(path)
            return file.schema_arrow, file.iter_batches(batch_size=BATCH)
        stream = self.arrow.ipc.open_stream(self.arrow.memory_map(str(path)))
        return stream.schema, (batch.slice(at, BATCH) for batch in stream for at in range(0, batch.num_rows, BATCH))

    def _rows(self, path: Path, label: str, split: str | None) -> Iterator[Sample | Remark]:
        number = 0
        try:
            schema, batches = self._batches(path)
            column, classes = self._picture_column(path, schema), self._classes(schema)
            for batch in batches:
                for row in batch.to_pylist():
                    key = f"{label}/{number:09d}"
                    stated = split_in(row) if self.reading.splits == "names" else None
                    if stated:
                        yield Remark(key, STATED, "guessed")
                    yield self._sample(row, key, column, classes, stated or split)
                    number += 1
        except (self.arrow.ArrowException, OSError, ValueError) as error:
            if number:
                yield Remark(label, f"damaged file (after row {number:,}: {error})")
            else:
                yield Remark(label, f"damaged file ({error})")

    def _picture_column(self, path: Path, schema: Any) -> str:
        """The column of pictures. Raises UserError(code 3) where there is none, or several and none is chosen."""
        types, binary = self.arrow.types, (self.arrow.types.is_binary, self.arrow.types.is_large_binary)
        holds = {
            field.name: any(is_bytes(field.type) for is_bytes in binary)
            or (types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
            for field in schema
        }
        found, wanted = [name for name, yes in holds.items() if yes], self.reading.image_field
        if not found or (wanted and wanted not in found):
            what = f"{path}: no column of pictures" + (f" is named {wanted}" if wanted else "")
            named = f"those that hold bytes: {', '.join(found)}" if found else f"its columns are {', '.join(holds)}"
            raise UserError(what, hint=named, code=DATA)
        if len(found) > 1 and not wanted:
            hint = " or ".join(f"--image-field {name}" for name in found)
            raise UserError(f"{path}: several columns of pictures ({', '.join(found)})", hint=hint, code=DATA)
        column = self.reading.caption_column
        if column and plain_name(column) not in map(plain_name, holds):
            hint = f"its columns are {', '.join(holds)}"
            raise UserError(f"--caption-column {column}: no such column in {path}", hint=hint, code=DATA)
        return wanted or found[0]

    @staticmethod
    def _classes(schema: Any) -> dict[str, list[str]]:
        """The names behind the numbers of ClassLabel columns, as `datasets` stores them."""
        try:
            features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
            return {name: facts["names"] for name, facts in features.items() if facts.get("_type") == "ClassLabel"}
        except (ValueError, LookupError, TypeError, AttributeError):
            return {}

    def _sample(
        self, row: dict[str, Any], key: str, column: str, classes: dict[str, list[str]], split: str | None
    ) -> Sample | Remark:
        cell = row.pop(column)
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        name = str(cell.get("path") or "") if isinstance(cell, dict) else ""
        if not isinstance(data, bytes):
            if is_download(row) and row["status"] != "success":
                return Remark(key, failed(row["status"]), "ignored")
            return Remark(key, "no image" + (f" (the file only names {printable(name)})" if name else ""))
        if len(data) > LARGEST_FILE:
            return Remark(key, f"file too large ({len(data):,} bytes)")
        for label, names in classes.items():
            if isinstance(at := row.get(label), int) and 0 <= at < len(names):
                row[label] = names[at]
        try:
            captions = clean_captions(captions_in(row, self.reading.caption_column))
        except UserError as error:
            return Remark(key, error.what)
        meta = {name: value for name, value in without_captions(row).items() if not isinstance(value, bytes | dict)}
        texts = [name for name, value in row.items() if isinstance(value, str) and plain_name(name) not in COLUMNS]
        hint = " or ".join(f"--caption-column {name}" for name in texts[:4]) if not captions else ""
        suffix = Path(name).suffix if Path(name).suffix.lower() in SUFFIXES else ""
        return Sample(key, data, captions, meta, split, suffix, hint)


def labels(paths: list[Path]) -> list[str]:
    """Each file's path below the folder that all have in common, without suffix: what its keys begin with."""
    absolute = [path.absolute() for path in paths]
    parents = [set(path.parents) for path in absolute]
    common = max(set.intersection(*parents), key=lambda path: len(path.parts))
    return [path.relative_to(common).with_suffix("").as_posix() for path in absolute]
