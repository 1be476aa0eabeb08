"""Grey pictures of more than 8 bits to 8: what is black and white is told by the type of the numbers or by the user,
never by the picture's own greatest value, which differs from picture to picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.ledger import Effect
from training.pictures.formats import refuse

SAMPLE_FORMAT, BITS = 339, 258  # tags of a TIFF
ROWS = 1 << 20  # pixels converted at once: as float64 the whole would take eight times the picture
DIM = 16  # a picture that uses less than one part in so many of its range is told of
DARK = f"dark picture, under 1/{DIM} of its numbers' range in use"
OUTSIDE = "brightness outside of --range"
WIDE = re.compile(";16[BLN]")  # in Pillow's words for the stored bytes; ";16" alone is of 5 or 6 bits a channel
ROUNDED = "more than 8 bits a channel, rounded to 8"


def deep(image: Image.Image) -> bool:
    """Whether the picture's numbers are wider than 8 bits."""
    return str(image.mode).startswith(("I", "F"))


def wide(image: Image.Image) -> bool:
    """Whether an opened picture, whose data are not loaded yet, has more than 8 bits a channel, also where Pillow keeps
    no more of them: of colours in PNG and TIFF."""
    return deep(image) or any(WIDE.search(str(tile)) for tile in getattr(image, "tile", ()))


def eight_bits(
    image: Image.Image, limits: Sequence[float] | None, remarks: list[tuple[Effect, str]]
) -> Image.Image:
    """A grey picture of 16-bit, 32-bit or float numbers as 8 bits: `limits` (black, white), or those of unsigned 16
    bits.

    Raises UserError(code 3) for numbers of other types without limits, naming those found, and for NaN and infinity.
    """
    kind = kind_of(image)
    low, high = _found(image, kind)
    if not np.isfinite([low, high]).all():
        raise refuse("pixels that are not finite")
    if limits is None and kind != np.uint16:
        raise refuse(
            f"nothing says what is black and white in {kind.name} (found {low:.6g} to {high:.6g})",
            f"pack with --range {_proposed(low, high)}, one range for all pictures",
            "save it with 8 or 16 bits, in which black is 0 and white the greatest number",
        )
    black, white = limits or (0.0, 65535.0)
    if limits is None and (high - low) * DIM < white:
        remarks.append(("guessed", DARK))
    if low < black or high > white:
        remarks.append(("cut", OUTSIDE))
    result = Image.new("L", image.size)
    for top, values in _bands(image, kind):
        scaled = (values.astype(np.float64) - black).clip(0) * (255 / (white - black))
        result.paste(Image.fromarray((scaled + 0.5).clip(0, 255).astype(np.uint8)), (0, top))
    if isinstance(clear := image.info.get("transparency"), int):  # one number stands for nothing
        result.putalpha(Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8)))
    result.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    return result


def kind_of(image: Image.Image) -> np.dtype[np.generic]:
    """The type of the numbers as they were stored, in this machine's byte order."""
    if image.mode.startswith("I;16"):
        return np.dtype(np.uint16)
    tags = getattr(image, "tag_v2", None)
    if tags is None:  # PNG and PNM: Pillow gives their 16 bits so; PFM: float
        return np.dtype(np.float32 if image.mode == "F" else np.uint16)
    bits = int(np.max(tags.get(BITS, 32)))
    letter = {1: "uint", 2: "int", 3: "float"}.get(int(np.max(tags.get(SAMPLE_FORMAT, 1))), "int")
    return np.dtype(f"{letter}{bits}")


def _bands(image: Image.Image, kind: np.dtype[np.generic]) -> Iterator[tuple[int, NDArray[np.generic]]]:
    """The rows in parts, with the first row's number; unsigned 32 bits, which Pillow takes for signed, made whole."""
    rows = max(1, ROWS // image.width)
    for top in range(0, image.height, rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        yield top, values.view(np.uint32) if kind == np.uint32 and values.dtype == np.int32 else values


def _found(image: Image.Image, kind: np.dtype[np.generic]) -> tuple[float, float]:
    """The least and the greatest number; NaN where there is one."""
    ends = [(float(values.min()), float(values.max())) for _, values in _bands(image, kind)]
    return float(np.min([low for low, _ in ends])), float(np.max([high for _, high in ends]))


def _proposed(low: float, high: float) -> str:
    """LOW HIGH that a picture with these ends suggests, as they are typed."""
    usual = next((white for white in (1.0, 255.0, 65535.0) if low >= 0 and white / 2 < high <= 1.1 * white), None)
    return f"0 {usual:.0f}" if usual else f"{_typed(low)} {_typed(high if high > low else low + 1)}"


def _typed(number: float) -> str:
    """Six digits without an exponent, which after a minus argparse takes for a flag."""
    return np.format_float_positional(number, precision=6, fractional=False, trim="-")
