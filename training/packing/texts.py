"""What the files beside a picture say: caption files by line, records by column."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from training.errors import DATA, UserError
from training.packing.split_folders import names_split
from training.shards.captions import TEXT_FIELDS, clean_captions, lines, plain_name

LARGEST_TEXT = 4 << 20  # bytes of one picture's captions or metadata
SPLIT_COLUMNS = ("split", "subset", "partition")
STATED = "split taken from its metadata"
PASSED_OVER = "caption of a table or JSON, not taken where caption files are"
TEXTS = tuple(f".{field}" for field in TEXT_FIELDS)  # caption files, in any case


def several_lines(text: str) -> bool:
    """Whether more than one line of a caption file says anything."""
    return sum(bool(line.strip()) for line in lines(text)) > 1


def passed_over(others: list[object], captions: tuple[str, ...]) -> bool:
    """Whether any of the other captions of a picture is not among those that were taken."""
    try:
        return not set(clean_captions(others)) <= set(captions)
    except UserError:  # nor could it be
        return True


def split_in(record: Mapping[str, Any]) -> str | None:
    """The split that a record states in a column of that name."""
    stated = (value for name, value in record.items() if plain_name(name) in SPLIT_COLUMNS and isinstance(value, str))
    return next((split for value in stated if (split := names_split(value))), None)


def is_download(record: Mapping[str, Any]) -> bool:
    """Whether a record is what img2dataset says of a picture that it was to download."""
    return {"url", "key", "status", "error_message"} <= record.keys()


def failed(status: str) -> str:
    """What is said of a picture that img2dataset could not bring."""
    return f"row without a picture, img2dataset says {status}"


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
