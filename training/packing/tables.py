"""Tables of captions as people keep them, to rows: CSV and TSV, JSON and JSON lines, COCO's annotations, parquet."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, Literal

from training.errors import DATA, UserError
from training.pictures.decoding import SUFFIXES
from training.shards.captions import decode_text, lines, plain_name

Row = dict[str, Any]
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
LARGEST_TABLE = 1 << 30  # bytes
LARGEST_OTHER = 128 << 20  # bytes of a table that is not called metadata: COCO's captions have 90 million
# Names of the column that says which picture a row is about, the first that is there.
FILE_COLUMNS = (
    *("file_name", "filename", "file", "file_path", "filepath", "path", "image", "image_name", "image_file"),
    *("image_path", "img", "img_name", "img_path"),
)
EXAMPLE = "write a first line such as file_name,text"


def file_of(row: Row) -> str | None:
    """The picture's name in a row."""
    named = {plain_name(name): value for name, value in row.items()}
    found = next((named[name] for name in FILE_COLUMNS if named.get(name)), None)
    return found if isinstance(found, str) else None


def is_picture_name(cell: str) -> bool:
    """Whether a text reads as a picture's name."""
    return cell.strip().lower().endswith(SUFFIXES)


def read_rows(where: str, data: bytes) -> list[Row]:
    """The rows of the table named `where`, by its suffix. Raises UserError(code 3) where it is none."""
    suffix = PurePosixPath(where).suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(where, data)
    try:
        text = decode_text(data)
    except UserError as error:
        raise UserError(f"{where}: {error.what}", hint=error.hint, code=DATA) from None
    readers: dict[str, Callable[[str, str], Iterator[Row]]] = {".jsonl": _line_rows, ".ndjson": _line_rows}
    return list(readers.get(suffix, _json_rows if suffix == ".json" else _csv_rows)(where, text))


def _parquet_rows(where: str, data: bytes) -> list[Row]:
    from training.packing.arrow import arrow

    pyarrow = arrow(where)
    try:
        rows: list[Row] = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{where}: not readable as parquet ({error})", code=DATA) from None
    return rows


def _line_rows(where: str, text: str) -> Iterator[Row]:
    """A JSON object a line; or what people call so: a list, or objects over several lines."""
    rows: list[Row] = []
    for number, line in enumerate(lines(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            try:
                return _json_rows(where, text)
            except UserError:
                raise UserError(f"{where}: line {number} is not JSON ({error})", code=DATA) from None
        if isinstance(row, list) and not rows and not text[len(line) :].strip():
            return _json_rows(where, text)
        if not isinstance(row, dict):
            raise UserError(f"{where}: line {number} is not a JSON object", code=DATA)
        rows.append(row)
    return iter(rows)


def _json_rows(where: str, text: str) -> Iterator[Row]:
    """The rows of one JSON value, or of several one after the other."""
    values, at, decoder = [], 0, json.JSONDecoder()
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: is not JSON ({error})", code=DATA) from None
        values.append(value)
    whole = values[0] if len(values) == 1 else values
    rows = whole if isinstance(whole, list) else _object_rows(whole) if isinstance(whole, dict) else [whole]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{where}: entry {number} is not a JSON object", code=DATA)
    return iter(rows)


def _object_rows(value: Row) -> list[Any]:
    """COCO's `images` and `annotations`; a record by picture; captions by picture; or one record."""
    images, notes = value.get("images"), value.get("annotations")
    if isinstance(images, list) and isinstance(notes, list):
        names = {image.get("id"): file_of(image) for image in images if isinstance(image, dict)}
        notes = [note for note in notes if isinstance(note, dict) and note.get("caption")]
        lost = "image id {}"
        return [
            {"file_name": names.get(note.get("image_id")) or lost.format(note.get("image_id")), "text": note["caption"]}
            for note in notes
        ]
    if file_of(value) or not value:
        return [value]
    if all(isinstance(entry, dict) for entry in value.values()):
        return [{"file_name": name, **entry} for name, entry in value.items()]
    if all(isinstance(entry, str | list) for entry in value.values()) and any(map(is_picture_name, value)):
        return [{"file_name": name, "text": entry} for name, entry in value.items()]
    return [value]


def _delimiter(head: str) -> str:
    """What parts the cells of a header: the mark it has most of outside quotes."""
    bare = re.sub(r'"[^"]*"', "", head)
    return max(",;\t|", key=lambda mark: (bare.count(mark), mark == ","))


def _cells(where: str, text: str) -> list[list[str]]:
    """All rows of cells, whatever parts them; the line they end at is not told."""
    head, rest = [*text.split("\n", 1), ""][:2]
    if sep := re.fullmatch(r"sep=(.)\s*", head, re.IGNORECASE):  # a spreadsheet's note to itself
        text, delimiter = rest, sep[1]
    else:
        delimiter = _delimiter(head)

    def read(quoting: Literal[0, 3]) -> list[list[str]]:
        lines = io.StringIO(text, newline="")
        found = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, quoting=quoting, strict=True)
        return [[cell.strip() for cell in row] for row in found if any(map(str.strip, row))]

    try:
        return read(csv.QUOTE_MINIMAL)
    except csv.Error as error:
        if delimiter == "\t":  # a tab stands in no caption: there quotes are only quotes
            try:
                return read(csv.QUOTE_NONE)
            except csv.Error:
                pass
        hint = "a caption that begins with a quote must end with one, and quotes in it are doubled"
        raise UserError(f"{where}: not readable as CSV ({error})", hint=hint, code=DATA) from None


def _csv_rows(where: str, text: str) -> Iterator[Row]:
    cells = _cells(where, text)
    if not cells:
        return iter(())
    header = cells[0]
    if {plain_name(name) for name in header}.isdisjoint(FILE_COLUMNS) and any(map(is_picture_name, header)):
        if len(header) != 2:
            what = f"{where}: has no header, and {len(header)} columns"
            raise UserError(what, hint=EXAMPLE, code=DATA)
        header = ["file_name", "text"] if is_picture_name(header[0]) else ["text", "file_name"]
        cells.insert(0, header)
    rows = []
    for number, row in enumerate(cells[1:], 1):
        if any(row[len(header) :]):
            what = f"{where}: row {number} has {len(row)} cells, the header {len(header)}"
            raise UserError(what, hint="captions that hold the separator stand in quotes", code=DATA)
        rows.append({name: cell for name, cell in zip(header, row, strict=False) if name})
    return iter(rows)
