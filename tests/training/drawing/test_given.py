"""Pictures that are given by a folder: those that can be read, with their captions; the others are named."""

from __future__ import annotations

import os
from pathlib import Path

import packs

from training.drawing.given import given
from training.ledger import Ledger
from training.packing.problems import Problems


def test_the_pictures_of_a_folder(tmp_path: Path) -> None:
    packs.write(tmp_path, {"a.png": packs.png(0), "a.txt": "red\nround", "c.jpg": packs.png(1, "JPEG")})
    os.mkfifo(tmp_path / "b.png")
    ledger, problems = Ledger(), Problems()
    found = given("--image", str(tmp_path), ledger, problems)
    assert [(one.name, one.data, one.captions) for one in found] == [
        ("a.png", packs.png(0), ("red", "round")), ("c.jpg", packs.png(1, "JPEG"), ()),
    ]  # fmt: skip
    assert ledger.report()["left out"] == {"unreadable file": {"count": 1, "first": ["b"]}}
    assert len(problems.found) == 1
