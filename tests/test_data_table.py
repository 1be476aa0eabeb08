"""docs/data.md is true: its flags are in the help of the scripts, its suffixes are read, its sentences are said."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from training.doors.make_shards import build_parser
from training.pictures.decoding import SUFFIXES
from training.shards.captions import COLUMNS, TEXT_FIELDS
from training.shards.splits import WORDS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "data.md").read_text("utf-8")


def known_flags() -> set[str]:
    parser = build_parser()
    (verbs,) = [action for action in parser._actions if hasattr(action, "choices") and action.dest == "verb"]
    flags = {flag for verb in verbs.choices.values() for flag in verb._option_string_actions}  # type: ignore[union-attr]
    for script in ("encode_latents", "train_autoencoder", "train_denoiser", "generate", "evaluate"):
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "COLUMNS": "200"})
        flags |= set(re.findall(r"--[a-z][a-z-]+", done.stdout))
    return flags


def test_every_flag_named_is_there() -> None:
    named = set(re.findall(r"(--[a-z][a-z-]+)(?![.\w-])", TEXT))  # `--section.key` is a config's
    assert named - known_flags() == set()


def test_every_suffix_named_is_read() -> None:
    (row,) = [line for line in TEXT.splitlines() if line.startswith("| suffixes")]
    named = re.findall(r"`(\.\w+)`", row)
    assert set(named) == set(SUFFIXES)


def test_every_place_of_captions_is_named() -> None:
    section = TEXT.split("## Captions")[1].split("## ")[0]
    assert all(f"`{column}`" in section for column in COLUMNS)
    assert all(f"`NAME.{field}`" in section for field in TEXT_FIELDS)


def test_every_word_of_a_split_is_named() -> None:
    section = TEXT.split("## Splits")[1].split("##")[0]
    assert all(re.search(rf"\b{word}\b", section) for word in WORDS if word != "trainval")


@pytest.mark.parametrize("sentence", re.findall(r"\*([a-z][^*|`]+)\*", TEXT))
def test_every_sentence_quoted_is_said(sentence: str) -> None:
    """As it stands in the code, up to what it is filled with."""
    code = "".join(path.read_text("utf-8") for path in (ROOT / "training").rglob("*.py"))
    words = re.sub(r" \(.*| pid .*", "", sentence)
    assert words in code, sentence
