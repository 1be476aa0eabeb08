"""The flags of how pictures are read into a data set, and what they may be together."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Literal, get_args

from training.errors import UserError

Channels = Literal[1, 3, 4]


def add_picture_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--channels`, `--range` and `--ignore-alpha`."""
    add = parser.add_argument
    text = "1: grey, 3: colour, 4: colour with transparency, each for models of as many channels"
    add("--channels", type=int, choices=get_args(Channels), default=3, help=text)
    text = "black and white of grey pictures of more than 8 bits; needed for 32-bit, signed and float numbers"
    add("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
    add("--ignore-alpha", action="store_true", help="take the colours of all pictures as opaque")


def check_pictures(channels: int, limits: Sequence[float] | None, form: str) -> None:
    """Raises UserError for a range that is none, and for a format that does not keep the channels exact."""
    check_range(limits, "--range")
    if channels not in get_args(Channels):
        raise UserError(f"--channels: must be 1, 3 or 4 (got {channels})")
    if channels != 3 and form != "png":
        raise UserError(f"--channels {channels}: not with --format {form}", hint="take --format png")


def check_range(limits: Sequence[float] | None, flag: str) -> None:
    """Raises UserError for a range that is none."""
    if limits is not None and not (all(map(math.isfinite, limits)) and limits[0] < limits[1]):
        raise UserError(f"{flag}: LOW must be below HIGH (got {limits[0]:g} {limits[1]:g})")
