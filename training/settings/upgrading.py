"""Configs of earlier versions: what a file means that names none.

Version 1, which names no version: the words of captions are split by rule 1, and guidance.interval and zero_from are
in times t.
Version 2: rule 2, and shares of noise; a frozen text encoder is told of padding even where `text.masked` is false.
Version 3: there it is not (`text.mask_rule` 2). A run keeps the version it began with, so that it draws and resumes as
before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Values = dict[str, dict[str, Any]]
# By version, where they are other than the defaults.
RULES: dict[int, Values] = {
    1: {"text": {"rule": 1, "mask_rule": 1}, "guidance": {"interval_in": "t", "zero_in": "t"}},
    2: {"text": {"mask_rule": 1}},
}


def version(values: Mapping[str, Any]) -> int:
    """The version that a config names, 1 where it names none."""
    section = values.get("format")
    named = section.get("version") if isinstance(section, dict) else None
    return named if isinstance(named, int) else 1  # anything else is refused where the section is decoded


def run_version(run: str | Path | None) -> int | None:
    """The version of the config of a run that was begun; None where there is none."""
    from training.guarding import read_json

    path = Path(run or "") / "config.json"
    if not run or not path.is_file():
        return None
    values = read_json(path)
    return version(values) if isinstance(values, dict) else None


def upgrade(values: Values, families: Mapping[str, tuple[type, ...]], as_of: int) -> Values:
    """Values with the rules of version `as_of` written out where they say nothing themselves."""
    if "format" not in families:
        return values
    current = values.get("format", {})
    sections: Values = {"format": {**current, "version": as_of} if isinstance(current, dict) else current}
    for name, rules in RULES.get(as_of, {}).items():
        section, members = values.get(name, {}), families[name]
        if isinstance(section, dict):
            kinds = {getattr(member, "kind", None): member for member in members}
            member = kinds.get(section.get("kind", getattr(members[0], "kind", None)), object)
            fields = {field.name for field in dataclasses.fields(member)} if dataclasses.is_dataclass(member) else set()
            sections[name] = {**{key: rule for key, rule in rules.items() if key in fields}, **section}
    return {**values, **sections}
