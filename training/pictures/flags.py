"""The flags of how pictures are read into a data set, and what they may be together."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from training.errors import UserError
from training.pictures.hints import KINDS

Channels = Literal[1, 3, 4]


def add_picture_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--channels`, `--range` and `--ignore-alpha`."""
    add = parser.add_argument
    text = "1: grey, 3: colour, 4: colour with transparency, each for models of as many channels"
    add("--channels", type=int, choices=get_args(Channels), default=3, help=text)
    text = "black and white of grey pictures of more than 8 bits; needed for 32-bit, signed and float numbers"
    add("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
    add("--ignore-alpha", action="store_true", help="take the colours of all pictures as opaque")


def add_hint_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--hint`, `--hint-files` and `--hint-range`."""
    add = parser.add_argument
    text = "a hint beside each picture, for a control: made of its pixels (edges, mask), or a file of --hint-files"
    add("--hint", type=_kind, choices=KINDS, help=text)
    text = "hints are the files of this folder, named as their pictures are, and cropped and resized with them"
    add("--hint-files", type=Path, metavar="DIR", help=text)
    text = "black and white of hints of more than 8 bits"
    add("--hint-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)


def _kind(text: str) -> str:
    """As it is given. Raises UserError for a folder, which is meant for another flag."""
    if text not in KINDS and (Path(text).is_dir() or Path(text).name != text):
        hint = f"--hint {'|'.join(KINDS)} says what they are, --hint-files {text} where they lie"
        raise UserError(f"--hint {text}: is a folder, and no kind of hints", hint=hint)
    return text


def check_pictures(channels: int, limits: Sequence[float] | None, form: str) -> None:
    """Raises UserError for a range that is none, and for a format that does not keep the channels exact."""
    if limits is not None and not is_range(limits):
        raise UserError(f"--range: LOW must be below HIGH (got {limits[0]:g} {limits[1]:g})")
    if channels not in get_args(Channels):
        raise UserError(f"--channels: must be 1, 3 or 4 (got {channels})")
    if channels != 3 and form != "png":
        raise UserError(f"--channels {channels}: not with --format {form}", hint="take --format png")


def is_range(limits: Sequence[float]) -> bool:
    """Whether LOW and HIGH are finite, LOW below HIGH."""
    return all(map(math.isfinite, limits)) and limits[0] < limits[1]
