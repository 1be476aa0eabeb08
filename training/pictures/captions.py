"""Captions beneath pictures: in a font that has their characters, wrapped by measured width, cut with an ellipsis."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache

from PIL import ImageFont
from PIL.ImageFont import FreeTypeFont

from training.messages import note

SIZE = 11  # pixels of the font
LINE = 13  # from one line to the next
MOST = 4  # lines of a caption
# Pillow's own font has hardly more than ASCII. Of the machine's fonts, by file name, those that have most besides.
OTHERS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "Arial Unicode.ttf", "msyh.ttc")
NO_CHARACTER = "\uffff"  # drawn as every character is that a font lacks


@dataclass(frozen=True)
class Caption:
    """What is drawn: lines, and their font."""

    lines: list[str]
    font: FreeTypeFont


def plain_font() -> FreeTypeFont:
    """Pillow's own font, the same on every machine."""
    font = _font("")
    assert font is not None
    return font


def caption(text: str, width: int) -> Caption:
    """`text` on at most `MOST` lines of `width` pixels, broken at spaces, or within a word that is wider than a line;
    what does not fit ends in an ellipsis.

    Drawn in Pillow's own font, else in the first of `OTHERS` on this machine that has all its characters. Characters
    that none has stand without their accents, or as question marks, which is said once.
    """
    text = "".join(c if c.isprintable() else " " for c in text).strip()
    font = next((font for name in ("", *OTHERS) if (font := _font(name)) and all(_has(name, c) for c in text)), None)
    if font is None:
        font, text = plain_font(), _replaced(text)
    lines: list[str] = []
    while text:
        last = len(lines) == MOST - 1
        end = _fitting(text, width, font, "…" if last else "")
        if end < len(text) and not last and (space := text.rfind(" ", 0, end + 1)) > 0:
            end = space
        lines.append(text[:end].rstrip() + ("…" if last and end < len(text) else ""))
        text = "" if last else text[end:].lstrip()
    return Caption(lines, font)


def _fitting(text: str, width: int, font: FreeTypeFont, ending: str) -> int:
    """How many characters of `text` fit, one at least: all of them, or as many as do with `ending` after them; no
    accent is parted from its letter."""
    if font.getlength(text) <= width:
        return len(text)
    counts = range(1, len(text))
    end = max(1, bisect_right(counts, width, key=lambda n: font.getlength(text[:n].rstrip() + ending)))
    while end > 1 and unicodedata.combining(text[end]):
        end -= 1
    return end


def _replaced(text: str) -> str:
    """`text` in characters of Pillow's own font."""
    shown = {c: _nearest(c) for c in text if not _has("", c)}
    _tell("".join(sorted(c for c in shown if shown[c] == "?")))
    return "".join(shown.get(c, c) for c in text)


def _nearest(character: str) -> str:
    """The letter without its accents where the font has it, else a question mark; nothing for an accent alone."""
    letters = [c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c)]
    return "".join(c if _has("", c) else "?" for c in letters)


@cache
def _tell(lacking: str) -> None:
    if lacking:
        note(f"no font here has all of {lacking[:20]}: ? stands for it under pictures; install one, say fonts-noto-cjk")


@cache
def _font(name: str) -> FreeTypeFont | None:
    """A font by file name, looked for where the system keeps its fonts; None where it is not there."""
    try:
        font = ImageFont.truetype(name, SIZE) if name else ImageFont.load_default(size=SIZE)
    except OSError:
        return None
    return font if isinstance(font, FreeTypeFont) else None


@cache
def _has(name: str, character: str) -> bool:
    font = _font(name)
    assert font is not None
    return character == " " or bytes(font.getmask(character)) != bytes(font.getmask(NO_CHARACTER))
