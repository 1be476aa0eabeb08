"""A user without a home, or whose home cannot be written to: told where shards of an address may lie."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from training.errors import UserError
from training.shards.remote import open_address


@pytest.fixture
def address(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return f"file://{shapes}"


def test_no_home(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_uid: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(UserError, match="no home folder") as caught:
        open_address(address)
    assert "--cache-dir" in caught.value.hint
    assert os.path.isdir(open_address(address, str(tmp_path)))


def test_a_home_that_cannot_be_written_to(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc")
    with pytest.raises(UserError, match="cannot write /proc/") as caught:
        open_address(address)
    assert caught.value.code == 6 and caught.value.hint == "name another folder: --cache-dir DIR"
    assert os.path.isdir(open_address(address, str(tmp_path)))
