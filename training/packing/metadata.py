"""What the tables among the files say of each picture: captions in file order, and further columns."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Any

from training.errors import DATA, UserError
from training.messages import printable
from training.packing.sources import Reading, Remark
from training.packing.tables import (
    EXAMPLE,
    FILE_COLUMNS,
    LARGEST_OTHER,
    LARGEST_TABLE,
    TABLES,
    Row,
    file_of,
    read_rows,
)
from training.packing.trees import Tree
from training.shards.captions import as_list, captions_in, plain_name, without_captions

STRICT = (".jsonl", ".csv")  # a metadata file of these is nothing else
SUGGESTED = 5  # names that are looked for among all others, which takes its time


def is_metadata(name: str) -> bool:
    """Whether a file is a table by its name alone, `metadata.jsonl` and its like in any case."""
    path = PurePosixPath(name.lower())
    return path.stem == "metadata" and path.suffix in TABLES


@dataclass
class Record:
    """What the rows about one picture hold together."""

    captions: list[object] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def take(self, row: Row, column: str | None) -> None:
        """One row more: its captions after those of the rows before; of other columns every value that is new."""
        self.captions += captions_in(row, column)
        for name, value in without_captions(row).items():
            if plain_name(name) in FILE_COLUMNS:
                continue
            before = self.meta.setdefault(name, value)
            if before != value and value not in as_list(before):
                self.meta[name] = [*as_list(before), value]


class Names:
    """Pictures by name, found however a table spells them."""

    def __init__(self, names: Iterable[str], root: str = "") -> None:
        self.names, self.root = dict.fromkeys(names), root
        self._spelled: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            folded, base = self._fold(name), self._fold(posixpath.basename(name))
            for spelling in {folded, posixpath.splitext(folded)[0], f"*/{base}", f"*/{posixpath.splitext(base)[0]}"}:
                self._spelled[spelling].append(name)

    @staticmethod
    def _fold(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    def find(self, folder: str, spelled: str) -> tuple[str | None, bool]:
        """The picture that a table in `folder` calls `spelled`, and whether it is spelled so; None out of the tree."""
        name = spelled.strip().replace("\\", "/")
        if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
            return self._absolute(name)
        places = [posixpath.normpath(posixpath.join(folder, name)), posixpath.normpath(name)]
        places = [place for place in dict.fromkeys(places) if not place.startswith("..")]
        if exact := next((place for place in places if place in self.names), None):
            return exact, True
        for place in [*map(self._fold, places), *([] if "/" in name else [f"*/{self._fold(name)}"])]:
            if len(found := self._spelled.get(place, [])) == 1:
                return found[0], False
        return None, False

    def _absolute(self, name: str) -> tuple[str | None, bool]:
        """Below our own folder; or where the data were moved, by the longest end of the path that is one of ours."""
        if self.root and name.startswith(f"{self.root}/"):
            name = posixpath.normpath(name[len(self.root) + 1 :])
            return (name, True) if name in self.names else (None, False)
        parts = posixpath.normpath(name).split("/")[1:]
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((end for end in ends if end in self.names), None), False

    def like(self, name: str) -> str:
        """A name that may have been meant, in parentheses."""
        close = get_close_matches(posixpath.normpath(name.replace("\\", "/")), list(self.names), 1)
        return f" (did you mean {printable(close[0])}?)" if close else ""


class Metadata:
    """`records` by picture, `remarks` on what was done, `tables` that were read, `unread` ones, `columns` seen."""

    def __init__(self, tree: Tree, pictures: list[str], candidates: list[str], reading: Reading) -> None:
        """Reads the candidates. Raises UserError(code 3) for a metadata file that cannot be read."""
        self.records: dict[str, Record] = defaultdict(Record)
        self.remarks: list[Remark] = []
        self.tables: list[str] = []
        self.unread: list[str] = []
        self.needing = ""  # a table that wants a package to be read
        self.columns: dict[str, None] = {}
        self._tree, self._reading = tree, reading
        self._names = Names(pictures, str(tree.root.resolve()) if tree.root else "")
        self._suggested = 0
        named = [name for name in candidates if is_metadata(name)]
        for name in named:
            if name.lower().endswith(STRICT):
                self._take(name, self._rows(name, LARGEST_TABLE), True)
            else:
                self._try(name, True)
        others = [name for name in candidates if name not in named]
        if self.tables:
            self.unread += others
        else:
            for name in others:
                self._try(name, False)

    def _rows(self, name: str, limit: int) -> list[Row]:
        where = printable(f"{self._tree.name}/{name}")
        try:
            return read_rows(where, self._tree.text(name, limit))
        except UserError as error:
            hint = error.hint
            if "link out" in error.what:
                hint = "data sets made of links, as download caches are: cp -rL FOLDER COPY, and pack COPY"
            what = error.what if error.what.startswith(where) else f"{where}: {error.what}"
            raise UserError(what, hint=hint, code=DATA) from None

    def _try(self, name: str, named: bool) -> None:
        """What may be a table of something else: read where its rows name pictures of ours."""
        try:
            rows = self._rows(name, LARGEST_TABLE if named else LARGEST_OTHER)
        except UserError as error:
            if "pyarrow" in error.hint:
                if named:
                    raise
                self.needing = name
            rows = []
        folder = posixpath.dirname(name)
        if any(self._names.find(folder, file)[0] for row in rows[:1000] if (file := file_of(row))):
            self._take(name, rows, named)
        else:
            self.unread.append(name)

    def _take(self, table: str, rows: list[Row], named: bool) -> None:
        self.tables.append(table)
        if not named:
            self.remarks.append(Remark(printable(table), "table of another name than metadata, read", "guessed"))
        folder, column = posixpath.dirname(table), self._reading.caption_column
        for number, row in enumerate(rows, 1):
            self.columns.update(dict.fromkeys(name for name in row if plain_name(name) not in FILE_COLUMNS))
            file = file_of(row)
            if file is None and not named:
                self._lost(f"row {number}", table, named)
                continue
            if file is None:
                where = printable(f"{self._tree.name}/{table}")
                hint = f"each row needs file_name and text; its columns are {', '.join(row) or 'none'}; {EXAMPLE}"
                raise UserError(f"{where}: row {number} has no 'file_name'", hint=hint, code=DATA)
            name, exact = self._names.find(folder, file)
            if name is None:
                self._lost(file, table, named)
                continue
            if not exact:
                self.remarks.append(Remark(printable(f"{file} = {name}"), "name spelled otherwise", "guessed"))
            self.records[name].take(row, column)

    def _lost(self, file: str, table: str, named: bool) -> None:
        """A row that names no picture: of a metadata file the picture is missed, others may speak of more."""
        self._suggested += 1
        like = self._names.like(file) if self._suggested <= SUGGESTED else ""
        why = f"listed in {printable(posixpath.basename(table))} but not there{like}"
        self.remarks.append(Remark(printable(file), why, "left out" if named else "ignored"))
