"""Captions beneath pictures: every line fits, what is cut ends in an ellipsis, no character is an empty box unsaid."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from training.pictures import captions, grids
from training.pictures.captions import MOST, OTHERS, caption, plain_font

WORDS = "a small red circle above a large blue square on a yellow ground"
WIDE = "一只红色的小猫坐在一张蓝色的大椅子上面看着窗外的雨"


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without fonts of its own."""

    captions._tell.cache_clear()
    monkeypatch.setattr(captions, "OTHERS", ("none.ttf",))


def unspaced(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("width", [20, 48, 96, 97, 192])
@pytest.mark.parametrize("text", [WORDS, WIDE, "i" * 200, "w" * 200, f"{'m' * 40} and {WORDS}", f"{WORDS} {WIDE}"])
def test_every_line_fits_and_a_cut_is_shown(text: str, width: int) -> None:
    """By the font's own measure; the lines together are the caption, or a beginning of it with an ellipsis."""
    found = caption(text, width)
    assert 1 <= len(found.lines) <= MOST
    assert all(found.font.getlength(line) <= width for line in found.lines)
    shown = unspaced("".join(found.lines))
    whole = unspaced(captions._replaced(text) if "?" in shown else text)
    if shown != whole:
        assert len(found.lines) == MOST and shown.endswith("…") and whole.startswith(shown[:-1])


def test_what_fits_is_whole() -> None:
    """Words are kept together where there is room for them; one that is wider than a line is broken."""
    assert caption("a red circle above a square", 96).lines == ["a red circle above", "a square"]
    assert caption("a red circle", 96).lines == ["a red circle"] and caption("", 96).lines == []
    broken = caption("m" * 20, 96).lines
    assert "".join(broken) == "m" * 20 and len(broken) > 1
    assert caption("one\ntwo\ta\x1b[31m", 96).lines == ["one two a [31m"]


def test_the_last_line_holds_as_much_as_fits() -> None:
    """One more character would be too wide."""
    found = caption("w" * 200, 96)
    (last,) = found.lines[MOST - 1 :]
    assert last == "w" * (len(last) - 1) + "…"
    assert found.font.getlength("w" * len(last) + "…") > 96


def test_an_accent_stays_with_its_letter() -> None:
    """Written as two characters: no line begins with one."""
    found = caption("e\u0301" * 60, 96)
    assert all(line[0] != "\u0301" for line in found.lines)


def test_a_font_of_the_machine_draws_what_the_own_one_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that has all of the caption; captions of ASCII look the same on every machine."""
    there = [name for name in OTHERS if captions._font(name)]
    if not there:
        pytest.skip("no such font on this machine")
    assert caption("Ein grüner Würfel", 200).font.getname() == captions._font(there[0]).getname()  # type: ignore[union-attr]
    assert caption("a green cube", 200).font.getname() == plain_font().getname()


@pytest.mark.usefixtures("no_fonts")
def test_without_such_a_font_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Letters without their accents, question marks for the rest: told once, never an empty box."""
    assert caption("Ein grüner Würfel é", 300).lines == ["Ein gruner Wurfel e"]
    assert capsys.readouterr().err == ""
    found = caption("红 cat", 300)
    assert found.lines == ["? cat"] and "note: no font here has all of 红: ? stands for it" in capsys.readouterr().err
    caption("红 cat", 300)
    assert capsys.readouterr().err == ""
    box = plain_font().getmask("\uffff")
    assert all(bytes(plain_font().getmask(c)) != bytes(box) for c in found.lines[0] if c != " ")


def test_marks_stand_beside_captions() -> None:
    """A green dot or a red cross beneath the picture, not on it; the caption is drawn to its right."""
    white = Image.new("RGB", (96, 96), "white")
    sheet = np.asarray(grids.grid([white, white], 2, captions=["red", "red"], marks=[True, False])).astype(int)
    assert (sheet[:96] == 255).all()
    for x, strongest in ((0, 1), (100, 0)):
        mark = sheet[96:, x : x + grids.MARK].reshape(-1, 3)
        drawn = mark[mark.sum(1) < 600]
        assert len(drawn) > 8 and (drawn.argmax(1) == strongest).all()
    assert np.array_equal(sheet[96:, grids.MARK : 96], sheet[96:, 100 + grids.MARK : 196])
