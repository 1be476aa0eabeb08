"""The ledger of what was not used as it was given: by effect and kind, with counts and first names.

Whoever leaves out, cuts, guesses, replaces or ignores something of the user's writes it here, where it happens; who
began the work shows `lines()` at its end and stores `report()` beside the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

# left out: a sample that is not in the result. cut: a part of it is not. guessed: nothing said what it is.
# replaced: something else stands in its place. ignored: given, and without use here.
Effect = Literal["left out", "cut", "guessed", "replaced", "ignored"]
EFFECTS: tuple[Effect, ...] = get_args(Effect)
SHOWN = 5  # first names kept of each kind


class Ledger:
    """Counts and first names by (effect, kind). A kind is a few words that many share; what differs is in the names."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Effect, str], tuple[int, list[str]]] = {}

    def add(self, effect: Effect, kind: str, name: str = "", count: int = 1) -> None:
        """`count` more of a kind; details in parentheses do not make a kind of their own."""
        kind = kind.split(" (")[0]
        before, names = self._entries.get((effect, kind), (0, []))
        names = [*names, name][:SHOWN] if name and name not in names else names
        if before + count:
            self._entries[effect, kind] = before + count, names

    def merge(self, report: Mapping[str, Any]) -> None:
        """Everything of another ledger's `report()`, as other processes hand it over."""
        for effect in EFFECTS:
            for kind, entry in report.get(effect, {}).items():
                self.add(effect, kind, count=entry["count"] - len(entry["first"]))
                for name in entry["first"]:
                    self.add(effect, kind, name)

    def count(self, *effects: Effect) -> int:
        """How many entries have one of the effects; of all where none is named."""
        return sum(count for (effect, _), (count, _) in self._entries.items() if effect in (effects or EFFECTS))

    def report(self) -> dict[str, dict[str, dict[str, Any]]]:
        """As JSON: effect -> kind -> {count, first}."""
        report: dict[str, dict[str, dict[str, Any]]] = {}
        for (effect, kind), (count, names) in sorted(self._entries.items(), key=_place):
            report.setdefault(effect, {})[kind] = {"count": count, "first": names}
        return report

    def lines(self) -> list[str]:
        """For people, a line a kind: `left out 3: no caption (a, b, c)`."""
        lines = []
        for (effect, kind), (count, names) in sorted(self._entries.items(), key=_place):
            more = " …" if count > len(names) else ""
            lines.append(f"{effect} {count:,}: {kind}" + (f" ({', '.join(names)}{more})" if names else ""))
        return lines


def _place(item: tuple[tuple[Effect, str], Any]) -> tuple[int, str]:
    (effect, kind), _ = item
    return EFFECTS.index(effect), kind
