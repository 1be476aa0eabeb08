"""The captions that a drawing is asked for: read from a file, and told how the text encoder reads them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import DATA, UserError, as_user_error
from training.messages import note, warn
from training.models.captions_read import CUT, UNKNOWN, short

if TYPE_CHECKING:
    import argparse

    from ldm.text import TextEncoder
    from training.drawing.given import Given
    from training.ledger import Ledger

LARGEST = 64 << 20  # bytes of a file of prompts
SHOWN = 20  # prompts of which it is said how they are read; the ledger counts the others
BLANK = "captions without a word that the vocabulary has"


def prompts_of(
    args: argparse.Namespace, sources: Sequence[Given], ledger: Ledger
) -> list[tuple[str, Given | None]]:
    """Each picture drawn from with each caption asked for, or, where none is, with the first one beside it.

    Raises UserError where nothing says what to draw.
    """
    if args.prompt is not None or args.prompts:
        captions = prompts(args, ledger)
        begun: Sequence[Given | None] = sources or [None]
        return [(caption, source) for source in begun for caption in captions]
    if not sources:
        raise UserError("nothing says what to draw", hint="give --prompt TEXT, --prompts FILE or --like PICTURE")
    if bare := [source.name for source in sources if not source.captions]:
        some = f"{bare[0]} and {len(bare) - 1} more have" if bare[1:] else f"{bare[0]} has"
        hint = "give --prompt TEXT for all of them, or lay a text file of its name beside each picture of a folder"
        raise UserError(f"{some} no caption", hint=hint, code=DATA)
    ledger.add("ignored", "captions after a picture's first", count=sum(len(s.captions) - 1 for s in sources))
    return [(source.captions[0], source) for source in sources]


def prompts(args: argparse.Namespace, ledger: Ledger) -> list[str]:
    """The captions asked for: --prompt TEXT (repeatable), or those `listed` in --prompts FILE."""
    return list(args.prompt) if args.prompt is not None else listed(Path(args.prompts), ledger)


def listed(path: Path, ledger: Ledger) -> list[str]:
    """The captions of a file: its lines but blank and # ones. Raises UserError (exit 3) where there are none.

    Lines end in a line feed, before which a carriage return may stand: all else belongs to the prompt.
    """
    lines = _text(path).removesuffix("\n").split("\n")
    captions = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    ledger.add("ignored", "blank or comment lines", count=len(lines) - len(captions))
    if not captions:
        raise UserError(f"{path}: no prompts in it", hint="one prompt a line", code=DATA)
    return captions


def _text(path: Path) -> str:
    """A file of prompts. Raises UserError (exit 3) where it is not one."""
    hint = "give a file of one prompt a line, saved as UTF-8"
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file of prompts", hint=hint, code=DATA)
        if not path.is_file():  # opening a pipe may wait for ever
            raise UserError(f"{path}: not a regular file", hint=hint, code=DATA)
        if (size := path.stat().st_size) > LARGEST:
            raise UserError(f"{path}: {size:,} bytes of prompts (limit {LARGEST:,})", hint=hint, code=DATA)
        data = path.read_bytes()
    except OSError as failure:
        why = os.strerror(failure.errno) if failure.errno else str(failure)
        raise UserError(f"{str(path)[:200]}: cannot be read ({why})", hint=hint, code=DATA) from None
    try:
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("UTF-16")
        if b"\0" in data:
            raise ValueError(f"byte {data.index(0)} is 0")
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as failure:
        why = f"byte {failure.start}"
    except ValueError as failure:
        why = str(failure)
    raise UserError(f"{path}: not a UTF-8 text file ({why})", hint=hint, code=DATA)


def tell_reading(captions: Iterable[str], ledger: Ledger, text: TextEncoder, *, aloud: bool = True) -> None:
    """Write into `ledger` what the text encoder does not read of each distinct caption, and say so of the first.

    Raises UserError where it cannot take one at all, as labels cannot.
    """
    distinct, said = list(dict.fromkeys(captions)), 0
    with as_user_error("give one of those, in the same spelling"):
        readings = text.readings(distinct)
    for caption, reading in zip(distinct, readings, strict=True):
        shown, lacking = short(caption), ", ".join(dict.fromkeys(reading.unknown))
        said += bool(aloud and (reading.cut or reading.unknown))
        if reading.cut:
            ledger.add("cut", CUT, shown)
        if reading.blank:
            ledger.add("replaced", BLANK, shown)
        for word in reading.unknown:
            ledger.add("replaced", UNKNOWN, short(word))
        if not aloud or said > SHOWN:
            continue
        if reading.cut:
            warn(f"only the first {reading.read} of {reading.tokens} tokens of {shown!r} are read")
        if reading.blank:
            warn(f"the model knows no word of {shown!r} ({short(lacking)})")
        elif reading.unknown:
            note(f"words of {shown!r} that the model does not know: {short(lacking)}")
