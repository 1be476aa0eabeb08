"""Which split of a data set the names of its files and folders state."""

from __future__ import annotations

import re

WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class SplitConflict(ValueError):
    """Names that state more than one split; `splits` are those that they state."""

    def __init__(self, names: tuple[str, ...], splits: tuple[str, ...]) -> None:
        super().__init__(f"{'/'.join(names)} states more than one split ({', '.join(splits)})")
        self.splits = splits


def split_of(*names: str) -> str | None:
    """The split that the parts of a file's stem or of its folders' names state: `imagenet1k-validation-00` is `val`.

    Parts are what stands between `-`, `_`, `.`, `/`, blanks and digits, whatever their case. None where no part is the
    name of a split. Raises SplitConflict where they state two.
    """
    parts = (part for name in names for part in re.split(r"[-_./\s\d]+", name.casefold()))
    stated = tuple(dict.fromkeys(WORDS[part] for part in parts if part in WORDS))
    if len(stated) > 1:
        raise SplitConflict(names, stated)
    return stated[0] if stated else None
