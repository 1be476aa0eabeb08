"""What --help and docs/denoisers.md list is what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny

from training.drawing.flags import add_flags
from training.settings import decoding
from training.settings.families import (
    COUPLING,
    FAMILIES,
    RESTORING,
    SAMPLING,
    STUDENTS,
    TRAINING,
    Part,
    families,
    kinds,
    listing,
)
from training.settings.flags import Parser
from training.settings.kinds_table import HEAD, table

EDITING = RESTORING.sections + COUPLING.sections


@pytest.mark.parametrize("section", FAMILIES)
def test_the_listed_kinds_are_the_families_members(section: str) -> None:
    stage = "editing" if section in EDITING else "denoiser"
    assert kinds(section) == decoding.kinds(decoding.sections(stage)[section])
    assert section in TRAINING.sections + SAMPLING.sections + STUDENTS.sections + EDITING


def test_the_guide_lists_them_too() -> None:
    """Every section of either stage that is a choice among kinds, and every kind."""
    text = (tiny.ROOT / "docs" / "denoisers.md").read_text()
    assert table() in text, "renew it: python scripts/list_kinds.py --renew docs/denoisers.md"
    for stage in (*decoding.STAGES, "editing"):
        for section, members in families(stage).items():
            if found := decoding.kinds(members):
                assert f"\n| {section} | {', '.join(found)} |\n" in table()


def test_the_door_renews_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale = tmp_path / "page.md"
    stale.write_text(f"before\n\n{HEAD}| sampler | euler |\n\nafter | text\n")
    assert tiny.call("list_kinds", "--renew", stale) == 0
    assert stale.read_text() == f"before\n\n{table()}\nafter | text\n"
    assert tiny.call("list_kinds") == 0 and capsys.readouterr().out == table()


@pytest.mark.parametrize("flags", [*TRAINING.methods.values(), *SAMPLING.methods.values()])
def test_a_method_that_is_a_key_is_one_the_config_takes(flags: str) -> None:
    """As the example spells it, and every key of it changes the config or says what it holds by default."""
    given = dict(re.findall(r"--(\w+\.\w+) ([^\s,]\S*[^\s,]|\S)", flags))
    values = decoding.to_values(decoding.decode("denoiser", decoding.overlay({}, given)))
    assert given
    for key, text in given.items():
        section, _, name = key.partition(".")
        assert decoding.overlay({}, {key: text})[section][name] == values[section][name]
    if "posthoc_ema" in flags:
        assert (tiny.SCRIPTS / "posthoc_ema.py").is_file()


@pytest.mark.parametrize("flags", [*RESTORING.methods.values(), *COUPLING.methods.values()])
def test_an_edit_that_is_a_key_is_one_its_family_takes(flags: str) -> None:
    given = dict(re.findall(r"--(\w+\.\w+) (\S+)", flags))
    for section in {key.partition(".")[0] for key in given}:
        assert decoding.chosen(section, given).kind == given[f"{section}.kind"]


HELP = [
    ("generate", [SAMPLING, RESTORING, COUPLING]),
    ("evaluate", [SAMPLING, RESTORING]),
    ("train_denoiser", [TRAINING, SAMPLING]),
]


@pytest.mark.parametrize(("script", "parts"), HELP)
def test_help_lists_them(script: str, parts: list[Part]) -> None:
    shown, text = tiny.spawn(tiny.SCRIPTS / f"{script}.py", "--help").stdout, listing(*parts)
    assert text in shown
    for flags in (flags for part in parts for flags in part.methods.values()):
        assert flags in " ".join(text.split())


def test_help_names_the_method_that_restores_where_none_is_named() -> None:
    parser = Parser(prog="generate")
    add_flags(parser)
    shown = " ".join(parser.format_help().split())
    assert f"or of --posterior.kind (default: {decoding.chosen('measurement', {}).kind});" in shown
