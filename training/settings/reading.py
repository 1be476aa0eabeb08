"""Config files as text: found by name or path, parsed, each key with its line. Work and memory grow with the file's
size alone, which has a limit."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.guarding import each_once
from training.settings.families import suggestion

CONFIGS = Path(__file__).parents[2] / "configs"  # by its place: many folders have that name
LARGEST = 1 << 20  # bytes a config file may have
MOST_DOTS = 200  # in a line: tomllib takes the square of a dotted key's parts
Values = dict[str, dict[str, Any]]


def names(stage: str) -> list[str]:
    """The configs that come with the package, as `--config NAME` takes them."""
    return sorted(path.stem for path in (CONFIGS / stage).iterdir() if path.suffix == ".toml")


def read(stage: str, source: str) -> tuple[str, str]:
    """The text of config NAME or FILE, and what it is called in messages. Raises UserError."""
    path = Path(source)
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if not path.is_file():
        file = CONFIGS / stage / f"{source.removesuffix('.toml')}.toml"
        if not file.is_file():
            raise UserError(
                f"no config named '{source}'{suggestion(source, names(stage))}",
                hint=f"known names: {', '.join(names(stage))}; or give a .toml or .json file",
            )
        return file.read_text("utf-8"), f"{stage}/{source.removesuffix('.toml')}.toml"
    if path.stat().st_size > LARGEST:
        what = f"{path}: a config of {path.stat().st_size:,} bytes is too large (limit {LARGEST:,})"
        raise UserError(what, hint="is this the right file?")
    try:
        return path.read_text("utf-8"), str(path)
    except UnicodeDecodeError as failure:
        raise UserError(f"{path}: not UTF-8 (byte {failure.start})", hint="save the file as UTF-8") from None


def parse(text: str, where: str) -> Values:
    """Sections of keys, from TOML or JSON. Raises UserError with the place of a mistake."""
    try:
        in_json = where.endswith(".json") and text.lstrip()[:1] in ("{", "[")
        if not in_json:
            _refuse_dots(text)
        values = json.loads(text, object_pairs_hook=each_once) if in_json else tomllib.loads(text)
    except (ValueError, RecursionError) as failure:
        found = re.search(r"(overwrite|twice).*\(at line (\d+)", str(failure))
        if found:
            key = text.splitlines()[int(found[2]) - 1].partition("=")[0].strip()
            raise UserError(f"{where}:{found[2]}: '{key}' is given twice", hint="keep one of them") from None
        raise UserError(f"{where}: {failure}", hint="correct the file at that place") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{where}: expected sections of keys, got a list",
            hint="start from a packaged config: --print-config shows one",
        )
    return values


def _refuse_dots(text: str) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > MOST_DOTS and not line.lstrip().startswith("#"):
            raise ValueError(f"more than {MOST_DOTS} dots in a line (at line {number})")


def lines(text: str) -> Iterator[tuple[str, int]]:
    """(`section.key`, or `section`, and its line) of a config's text."""
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[([\w-]+)\]", line):
            section = match[1]
            yield section, number
        elif match := re.match(r"\s*\"?([\w-]+)\"?\s*[=:]\s*({?)", line):
            section = match[1] if match[2] else section
            yield section if match[2] else f"{section}.{match[1]}" if section else match[1], number


def literal(raw: str) -> Any:
    """The text of a flag as the value it spells: number, true/false, list (also `1,2,3`), else the text itself."""
    for attempt in (raw, f"[{raw}]" if "," in raw else raw):
        try:
            return json.loads(attempt)
        except (ValueError, RecursionError):  # ValueError: a number of thousands of digits, too
            continue
    try:
        return float(raw)  # 1e-4 is JSON, but .5 and 1E-4 are not all
    except ValueError:
        return raw
