"""Captions as they are found beside a picture or in a record, to clean text: one line, no control characters, valid
Unicode. Packing, indexing, encoding and verifying go by this one rule."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from training.errors import DATA, UserError
from training.pictures.formats import FIELDS

CAPTION_LIMIT = 20_000  # characters; beyond is no caption but a wrong file
MOST_CAPTIONS = 1_000  # of one picture; beyond is a list of something else
COLUMNS = ("captions", "text", "caption")  # of a record, the first that holds anything
TEXT_FIELDS = ("txt", "caption")  # of a sample: files of captions


def decode_text(data: bytes) -> str:
    """UTF-8 text, with or without a byte order mark; UTF-16 with one. Raises UserError(code 3) for others."""
    try:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return data.decode("utf-16")
        if 3 * data.count(0) > len(data):
            raise UserError("caption not UTF-8 (UTF-16 without its mark?)", hint="save it as UTF-8", code=DATA)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"caption not UTF-8 (byte {error.start})", hint="save it as UTF-8", code=DATA) from None


def clean_captions(texts: Iterable[object]) -> tuple[str, ...]:
    """Captions with white space and control characters made single spaces; blank ones and repetitions left out.

    Raises UserError(code 3) for anything but strings, for endless ones and for too many.
    """
    captions: dict[str, None] = {}
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"caption not a string ({text!r:.40})", code=DATA)
        line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\ufeff]", " ", text).split())
        if len(line) > CAPTION_LIMIT:
            raise UserError(f"caption too long ({len(line):,} characters)", code=DATA)
        if any("\ud800" <= letter <= "\udfff" for letter in line):  # JSON can spell half a character
            raise UserError("caption not valid Unicode (a lone surrogate)", code=DATA)
        if line:
            captions[line] = None
    if len(captions) > MOST_CAPTIONS:
        raise UserError(f"more than {MOST_CAPTIONS:,} captions ({len(captions):,})", code=DATA)
    return tuple(captions)


def lines(text: str) -> list[str]:
    """The lines of a text, parted by `\\n` and `\\r\\n` alone: U+2028, form feeds and their like stand inside captions
    and JSON strings."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def texts_of(text: str, how: Literal["each", "join"]) -> list[str]:
    """The captions of a caption file: each of its lines, or all as one."""
    return lines(text) if how == "each" else [text]


def as_list(value: object) -> list[object]:
    """A column's value as the list of captions it stands for."""
    return value if isinstance(value, list) else [] if value is None else [value]


def plain_name(column: str) -> str:
    """A column's name as it is looked for: ` File Name` is `file_name`."""
    return re.sub(r"[\s-]+", "_", column.strip().lower())


def captions_in(record: Mapping[str, Any], column: str | None = None) -> list[object]:
    """The captions a record holds, under `column` or the names in use."""
    named = {plain_name(name): value for name, value in record.items()}
    found = (named.get(plain_name(name)) for name in ([column] if column else COLUMNS))
    return next((as_list(value) for value in found if value), [])


def without_captions(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that say something else of a picture."""
    return {name: value for name, value in record.items() if plain_name(name) not in COLUMNS}


def record_of(data: bytes) -> dict[str, Any]:
    """The JSON beside a picture as a record. Raises UserError(code 3) for what is no JSON."""
    try:
        record = json.loads(decode_text(data))
    except (ValueError, RecursionError):
        raise UserError("metadata not JSON", code=DATA) from None
    return record if isinstance(record, dict) else {"json": record}


def captions_of(record: Mapping[str, Any], texts: Iterable[str]) -> tuple[str, ...]:
    """A sample's captions: `captions` of its record, then `texts`; where there are none, `text` or `caption` of the
    record. Raises UserError(code 3) as `clean_captions`."""
    listed = next((as_list(value) for name, value in record.items() if plain_name(name) == COLUMNS[0]), [])
    return clean_captions([*listed, *texts]) or clean_captions(captions_in(record))


def text_fields(fields: Collection[str]) -> list[str]:
    """The fields of a sample that are caption files: `txt` and `caption`, then those named after its picture, as
    `png.txt`."""
    named = (f"{picture}.{text}" for picture in FIELDS for text in TEXT_FIELDS)
    return [field for field in (*TEXT_FIELDS, *named) if field in fields]


def stored_captions(fields: Mapping[str, bytes]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(metadata, captions) of a sample in a shard, whoever wrote it: `captions_of` its `json`, and of the lines of its
    caption files. No captions where it has none.

    Raises UserError(code 3) where they cannot be read.
    """
    record = record_of(fields["json"]) if "json" in fields else {}
    texts = [line for name in text_fields(fields) for line in lines(decode_text(fields[name]))]
    return without_captions(record), captions_of(record, texts)
