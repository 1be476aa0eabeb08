"""Is it the same ingredient? One rule for all that goes by content hash: data, networks, vocabularies, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """An ingredient that is another than before: its name, and the first 12 digits of both hashes, or "none"."""

    name: str
    before: str
    now: str


def difference(baseline: Mapping[str, Any], current: Mapping[str, Any], names: Iterable[str] = ()) -> Difference | None:
    """The first of `names` under which `current` differs from `baseline`; None where all are the same.

    Without names, those that both tell: what an older record does not name says nothing.
    """
    for name in names or [name for name in current if baseline.get(name) is not None and current[name] is not None]:
        before, now = (hashes.get(name) for hashes in (baseline, current))
        if before != now:
            return Difference(name, *("none" if value is None else str(value)[:12] for value in (before, now)))
    return None
