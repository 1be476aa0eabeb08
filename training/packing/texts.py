"""What the files beside a picture say: caption files by line, records by column."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from training.errors import DATA, UserError
from training.packing.split_folders import names_split
from training.shards.captions import clean_captions

MOST_CAPTIONS = 1_000  # of one picture; beyond is a list of something else
LARGEST_TEXT = 4 << 20  # bytes of one picture's captions or metadata
COLUMNS = ("captions", "text", "caption")  # of a metadata record, the first that holds anything
SPLIT_COLUMNS = ("split", "subset", "partition")
STATED = "split taken from its metadata"
TEXTS = (".txt", ".caption")  # caption files, in any case


def clean(texts: Iterable[object]) -> tuple[str, ...]:
    """`clean_captions` of one picture. Raises UserError(code 3) for too many besides."""
    captions = clean_captions(texts)
    if len(captions) > MOST_CAPTIONS:
        raise UserError(f"more than {MOST_CAPTIONS:,} captions ({len(captions):,})", code=DATA)
    return captions


def lines(text: str) -> list[str]:
    """The lines of a text, parted by `\\n` and `\\r\\n` alone: U+2028, form feeds and their like stand inside captions
    and JSON strings."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def texts_of(text: str, how: Literal["each", "join"]) -> list[str]:
    """The captions of a caption file: each of its lines, or all as one."""
    return lines(text) if how == "each" else [text]


def several_lines(text: str) -> bool:
    """Whether more than one line of a caption file says anything."""
    return sum(bool(line.strip()) for line in lines(text)) > 1


def as_list(value: object) -> list[object]:
    """A column's value as the list of captions it stands for."""
    return value if isinstance(value, list) else [] if value is None else [value]


def plain_name(column: str) -> str:
    """A column's name as it is looked for: ` File Name` is `file_name`."""
    return re.sub(r"[\s-]+", "_", column.strip().lower())


def captions_in(record: Mapping[str, Any], column: str | None = None) -> list[object]:
    """The captions a metadata record holds, under `column` or the names in use."""
    named = {plain_name(name): value for name, value in record.items()}
    found = (named.get(plain_name(name)) for name in ([column] if column else COLUMNS))
    return next((as_list(value) for value in found if value), [])


def without_captions(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that say something else of a picture."""
    return {name: value for name, value in record.items() if plain_name(name) not in COLUMNS}


def split_in(record: Mapping[str, Any]) -> str | None:
    """The split that a record states in a column of that name."""
    stated = (value for name, value in record.items() if plain_name(name) in SPLIT_COLUMNS and isinstance(value, str))
    return next((split for value in stated if (split := names_split(value))), None)


def name_as_caption(key: str, which: Literal["filename", "folder"]) -> str:
    """The words of a picture's own name, or of the folder it lies in, which may be its class. Raises UserError(code 3)
    where it lies in none, or in one that names a split."""
    *folders, name = key.split("/")
    if which == "folder":
        if not folders or names_split(folders[-1]):
            what = "no caption, and no folder of a class"
            raise UserError(what, hint="--missing-caption filename or empty", code=DATA)
        name = folders[-1]
    return re.sub(r"[_\s-]+", " ", name).strip()
