"""Captions as they are found, to clean text: one line, no control characters, valid Unicode."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from training.errors import DATA, UserError

CAPTION_LIMIT = 20_000  # characters; beyond is no caption but a wrong file


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

    Raises UserError(code 3) for anything but strings and for endless ones.
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
    return tuple(captions)


def stored_captions(fields: Mapping[str, bytes]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(metadata, captions) of a sample in a shard, whoever wrote it: `captions` of its `json` and the lines of its
    `txt`; where there are none, `text` or `caption` of its `json`. No captions where it has none.

    Raises UserError(code 3) where they cannot be read.
    """
    try:
        record = json.loads(fields["json"]) if "json" in fields else {}
    except (ValueError, RecursionError):
        raise UserError("metadata not JSON", hint="pack again", code=DATA) from None
    record = record if isinstance(record, dict) else {"json": record}
    lines = decode_text(fields.get("txt", b"")).split("\n")
    captions = clean_captions([*_as_list(record.get("captions")), *lines])
    if not captions:
        others = (_as_list(record[name]) for name in ("text", "caption") if record.get(name))
        captions = clean_captions(next(others, []))
    return {name: value for name, value in record.items() if name not in ("captions", "text", "caption")}, captions


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]
