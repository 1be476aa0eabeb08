"""Which folders of samples are splits, and which are classes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from training.errors import DATA, UserError
from training.shards import splits
from training.shards.splits import WORDS

Taken = tuple[str, str]  # a split, and the name it was taken from


def _words(name: str) -> list[str]:
    """The runs of letters, in small ones: digits and punctuation part them (`val2014`, `train_a`)."""
    return [word for word in re.split(r"[^a-z]+", name.lower()) if word]


def split_of(name: str) -> str | None:
    """The split that a name states. Raises UserError(code 3) where it states two, with both ways out."""
    try:
        return splits.split_of(name)
    except UserError as error:
        raise UserError(error.what, hint=f"{error.hint}, or draw all by hash: --splits draw", code=DATA) from None


def names_split(name: str) -> str | None:
    """The split where the name is that word and nothing else but digits."""
    words = _words(name)
    return WORDS.get(words[0]) if len(words) == 1 else None


def _level(names: set[str]) -> dict[str, str]:
    """The splits of folders that stand side by side ("": files beside them), where they are splits at all.

    Where others stand among them, as classes do, only the bare words count, and `train` alone may be a class.
    """
    if "" not in names and all(set(_words(name)) & WORDS.keys() for name in names):
        return {name: split for name in names if (split := split_of(name))}
    exact = {name: split for name in names if (split := names_split(name))}
    return exact if set(exact.values()) - {"train"} else {}


def split_folders(folders: Iterable[str]) -> dict[str, Taken]:
    """The split of each folder of samples (`a/b/c`) that has one, with the part of its path that says so.

    The first level that divides the samples counts; one that all of them share, only where no other speaks.
    Raises UserError(code 3) where a folder speaks of two.
    """
    below: dict[str, set[str]] = defaultdict(set)
    every = set(folders)
    for folder in every:
        parts = folder.split("/") if folder else []
        for depth in range(len(parts) + 1):
            below["/".join(parts[:depth])].add(parts[depth] if depth < len(parts) else "")
    levels = {place: _level(names) if len(names) > 1 else {} for place, names in below.items()}
    taken: dict[str, Taken] = {}
    for folder in every:
        parts, shared = folder.split("/") if folder else [], None
        for depth, part in enumerate(parts):
            place = "/".join(parts[:depth])
            if split := levels[place].get(part):
                taken[folder] = split, "/".join(parts[: depth + 1])
                break
            if len(below[place]) == 1 and shared is None and (split := names_split(part)):
                shared = split, "/".join(parts[: depth + 1])
        else:
            if shared:
                taken[folder] = shared
    return taken
