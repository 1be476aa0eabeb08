"""What --help and the README list is what there is."""

from __future__ import annotations

import re

import pytest
import tiny

from training import config as configs
from training.names import KINDS, SAMPLING, TRAINING, listing


@pytest.mark.parametrize("section", KINDS)
def test_the_listed_kinds_are_the_families_members(section: str) -> None:
    assert KINDS[section].split(", ") == configs.kinds(configs.sections("denoiser")[section])


STAGES = {(stage, name): ", ".join(found) for stage in ("autoencoder", "denoiser")
          for name, members in configs.sections(stage).items() if (found := configs.kinds(members))}  # fmt: skip


@pytest.mark.parametrize("section", STAGES)
def test_the_readme_lists_them_too(section: tuple[str, str]) -> None:
    """Every section of either stage that is a choice among kinds."""
    rows = dict(re.findall(r"^\| (\S+) \| (.*) \|$", (tiny.ROOT / "README.md").read_text(), re.MULTILINE))
    assert rows[section[1]] == STAGES[section]


@pytest.mark.parametrize(("script", "sections"), [("generate", SAMPLING), ("train_denoiser", (*TRAINING, *SAMPLING))])
def test_help_lists_them(script: str, sections: tuple[str, ...]) -> None:
    assert listing(sections) in tiny.spawn(tiny.SCRIPTS / f"{script}.py", "--help").stdout
