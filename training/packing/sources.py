"""What a source of captioned pictures is: it yields `Sample`s in a fixed order, and a `Remark` for everything it had to
leave out or did otherwise than one might think.

Adding a source: a class with `name`, `total`, `state()` and `samples()`, and a line in
`training.packing.finding.find_source`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from training.errors import DATA, UserError
from training.ledger import Effect
from training.pictures.decoding import LARGEST_FILE, read_file
from training.shards.opened import Opened


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a user's own files are read.

    `caption_column`: the only column captions come from; `caption_lines`: whether each line of a caption file is a
    caption, or all are one; `image_field`: the picture, of several under one key; `splits`: by the names of folders
    and files, or drawn by hash whatever they are called.
    """

    caption_column: str | None = None
    caption_lines: Literal["each", "join"] = "each"
    image_field: str | None = None
    splits: Literal["names", "draw"] = "names"


@dataclass(frozen=True)
class Stored:
    """A file where it lies, or a member of a tar that is not compressed: `size` bytes of `path` at `offset`, or all of
    it. Who makes the picture reads it, so that no process reads for all."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Its bytes. Raises UserError(code 3) where they cannot be had."""
        try:
            if self.size is None:
                return read_file(self.path, LARGEST_FILE)
            file = Opened(self.path)
            try:
                return file.read(self.size, self.offset)
            finally:
                file.close()
        except UserError as error:
            raise UserError(error.what, code=DATA) from None  # as a source says it that reads its files itself


@dataclass(frozen=True)
class Sample:
    """One captioned picture. `image` is decoded, a file's bytes or where they are; no captions: none was found; `split`
    None: not decided."""

    key: str
    image: Image.Image | bytes | Stored
    captions: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    suffix: str = ""  # of the picture's file, which is named key + suffix where it is refused
    hint: str = ""  # where its caption may be, if it has none


@dataclass(frozen=True)
class Remark:
    """Something to report about a key, as the ledger names it: a sample that cannot be used, or what else was done."""

    key: str
    reason: str
    effect: Effect = "left out"
    count: int = 1


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
