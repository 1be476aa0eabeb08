"""What the packages may be: each with a lowest version in pyproject.toml, and the one tested in constraints.txt."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ASKED = [Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
ROWS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
TESTED = {canonicalize_name(row.partition("==")[0]): row.partition("==")[2] for row in ROWS}


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.name)
def test_a_dependency(asked: Requirement) -> None:
    assert any(bound.operator in (">=", "==", "~=") for bound in asked.specifier), f"{asked.name} has no lowest version"
    assert asked.specifier.contains(metadata.version(asked.name), prereleases=True)
    tested = TESTED.get(canonicalize_name(asked.name), "")
    assert tested and asked.specifier.contains(tested), f"{asked.name} has no row in constraints.txt"


def test_constraints_name_one_version_each() -> None:
    """And nothing but versions: no address, no flag, which pip would follow."""
    assert len(TESTED) == len(ROWS) and all(tested[:1].isdigit() for tested in TESTED.values())
