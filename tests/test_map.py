"""CONTRIBUTING's map is that of the tree: every module stands in it, and every path it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
MAP = TEXT.split("## The map")[1].split("```")[1]


def rooms() -> dict[str, str]:
    """The text of each package, and of each room of training/, in the map."""
    packages = re.split(r"^(\w+/) ", MAP, flags=re.MULTILINE)[1:]
    found = dict(zip(packages[::2], packages[1::2], strict=True))
    inner = re.split(r"^  (\w+/) ", found.pop("training/"), flags=re.MULTILINE)
    rows = {f"training/{name}": text for name, text in zip(inner[1::2], inner[2::2], strict=True)}
    return {**found, "training/": MAP, **rows}


@pytest.mark.parametrize("room", [room for room in rooms() if room.startswith(("autoencoder", "ldm", "training"))])
def test_every_module_is_on_the_map(room: str) -> None:
    text = rooms()[room]
    modules = [path.name for path in (ROOT / room).glob("*.py") if path.name != "__init__.py"]
    assert [name for name in modules if name not in text] == []
    folders = [path.name for path in (ROOT / room).iterdir() if (path / "__init__.py").is_file()]
    assert [name for name in folders if f"{name}/" not in text] == []
    for name in re.findall(r"\b\w+\.py\b", text) if room.startswith("training/") and room != "training/" else ():
        assert (ROOT / room / name).is_file() or (ROOT / "training" / name).is_file(), f"{room}{name}"


def test_every_path_named_is_there() -> None:
    for path in re.findall(r"`((?:autoencoder|ldm|training|scripts|tests|configs)/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path
    walks = TEXT.split("## How values travel")[1].split("## To add")[0]
    for path in re.findall(r"`(\w+/\w+\.py)`", walks):
        assert any((ROOT / package / path).is_file() for package in ("training", "ldm", ".")), path


def test_names_in_the_answers_are_there() -> None:
    table = TEXT.split("## Twenty questions")[1].split("## How values travel")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ")][2:]
    assert len(rows) == 20
    for file, name in re.findall(r"`([\w/]+\.py)`, `([A-Z][\w.]+)`", table):
        code = (ROOT / file).read_text("utf-8")
        for part in name.split("."):
            assert re.search(rf"(class|def) {part}\b", code) or f"{part} =" in code, f"{file}: {name}"
