"""Config files of any shape are read, or refused, in a time that grows with their size alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from training.errors import UserError
from training.settings import reading
from training.settings.decoding import load

MANY, LONG, DOTTED = 60_000, 200_000, 45_000  # dots that take 20 s to read where all are
FILES = {
    "keys.json": '{"train": {' + ",".join(f'"k{i}": 1' for i in range(MANY)) + "}}",
    "sections.json": "{" + ",".join(f'"k{i}": 1' for i in range(MANY)) + "}",
    "keys.toml": "[train]\n" + "\n".join(f"k{i} = 1" for i in range(MANY)),
    "sections.toml": "\n".join(f"[k{i}]" for i in range(MANY)),
    "dotted.toml": ".".join(["a"] * DOTTED) + " = 1",
    "dotted-header.toml": "[" + ".".join(["a"] * DOTTED) + "]",
    "dotted-inside.toml": "x = {" + ".".join(["a"] * DOTTED) + " = 1}",
    "many-dotted.toml": "\n".join(f"a{i}." + ".".join(["a"] * 199) + " = 1" for i in range(1000)),
    "nested.json": '{"x": ' + "[" * LONG + "]" * LONG + "}",
    "nested.toml": "x = " + "[" * LONG + "]" * LONG,
    "tables.toml": "x = " + "{a = " * MANY + "1" + "}" * MANY,
    "digits.json": '{"train": {"max_steps": ' + "1" * LONG + "}}",
    "long-key.toml": "k" * LONG + " = 1",
    "long-value.json": '{"optimizer": {"decay": "' + "x" * LONG + '"}}',
}


@pytest.mark.parametrize("name", FILES)
def test_time_and_message_are_bounded(name: str, tmp_path: Path) -> None:
    load("autoencoder", "smoke")  # what is imported on the way is no work of reading
    path = tmp_path / name
    path.write_text(FILES[name])
    assert path.stat().st_size <= reading.LARGEST
    begun = time.process_time()
    with pytest.raises(UserError) as caught:
        load("autoencoder", str(path))
    assert time.process_time() - begun < 10
    assert caught.value.code == 2 and len(caught.value.what) < 50_000


def test_more_mistakes_than_are_told_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"train": {' + ",".join(f'"k{i}": 1' for i in range(50)) + "}}")
    with pytest.raises(UserError) as caught:
        load("autoencoder", str(path))
    assert "train: 50 unknown keys" in caught.value.what and caught.value.what.count("unknown key 't") <= 20


def test_a_key_given_twice_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"train": {"max_steps": 1, "ema": 0.5, "max_steps": 2}}')
    with pytest.raises(UserError, match="'max_steps' is given twice"):
        load("autoencoder", str(path))


def test_a_flag_may_be_any_text() -> None:
    assert reading.literal("[" * LONG) == "[" * LONG  # no nesting that cannot be read
    assert reading.literal("1" * 5000) == float("inf")  # refused where it is decoded
    assert reading.literal("1,2") == [1, 2] and reading.literal(".5") == 0.5 and reading.literal("1E-4") == 1e-4
