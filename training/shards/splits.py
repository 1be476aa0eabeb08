"""Which split of a data set the names of its files and folders state."""

from __future__ import annotations

import re

from training.errors import DATA, UserError

WORDS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_of(*names: str) -> str | None:
    """The split that the parts of a file's stem or of its folders' names state: `imagenet1k-validation-00` is `val`.

    Parts are what stands between `-`, `_`, `.`, `/`, blanks and digits, whatever their case. None where no part is the
    name of a split. Raises UserError(code 3) where they state two.
    """
    parts = (part for name in names for part in re.split(r"[-_./\s\d]+", name.casefold()))
    stated = tuple(dict.fromkeys(WORDS[part] for part in parts if part in WORDS))
    if len(stated) > 1:
        what = f"{'/'.join(names)}: states more than one split ({', '.join(stated)})"
        raise UserError(what, hint="rename it so that one of train, val and test is a part of its name", code=DATA)
    return stated[0] if stated else None
