"""Shell scripts call doors and hold no Python of their own; what they, README and docs name is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import tiny

SHELL = sorted(tiny.SCRIPTS.rglob("*.sh"))
TEXTS = [*SHELL, tiny.ROOT / "README.md", *sorted((tiny.ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_a_shell_script(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).stderr == b""
    text = path.read_text()
    assert "<<" not in re.sub(r"<<<", "", text), "embedded code"
    if path.name != "environment.sh":
        (sourced,) = re.findall(r'source "\$\(dirname "\$\{BASH_SOURCE\[0\]\}"\)/(\S+)"', text)
        assert (path.parent / sourced).resolve() == tiny.SCRIPTS / "environment.sh"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_the_scripts_it_names_are_there(path: Path) -> None:
    for name in re.findall(r"scripts/[\w/]+\.(?:py|sh)\b", path.read_text()):
        assert (tiny.ROOT / name).is_file(), name
