"""Picture grids with captions, and the facts written into every PNG."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from torch import Tensor

from training.files import atomic_write, finite
from training.pictures.captions import LINE, caption, plain_font
from training.pictures.parameters import CHUNK, parameters

SMALLEST = 96  # pixels a cell is enlarged to, so that small pictures can be seen
MARK = 10  # pixels that a mark takes of its caption's width
SHEET = 64  # pictures on a contact sheet at most
LARGEST = 1 << 20  # characters of the facts in a picture
SEAL = "sha256"  # among the facts: over all others and the pixels
KEY = "ldm"  # the PNG text chunk that holds how a picture was made


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """uint8 (B,C,H,W) -> pictures: grey for C = 1, RGB for 3, RGBA for 4."""
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(p[..., 0] if p.shape[2] == 1 else p)) for p in arrays]


def grid(
    pixels: Tensor | Sequence[Image.Image],
    columns: int,
    *,
    captions: Sequence[str] = (),
    rows: Sequence[str] = (),
    marks: Sequence[bool] = (),
) -> Image.Image:
    """Pictures in reading order, a caption under each or a label beside each row; small ones enlarged evenly.

    `marks`: whether each picture is as its caption says, a green dot before it or a red cross.
    """
    images = list(pixels) if isinstance(pixels, Sequence) else to_pil(pixels)
    factor = max(1, -(-SMALLEST // max(images[0].size)))
    width, height = (side * factor for side in images[0].size)
    indent = MARK if marks else 0
    below = [caption(text, width - indent) for text in captions]
    under = 4 + LINE * max((len(text.lines) for text in below), default=0) if captions else 0
    margin = 12 + max((int(plain_font().getlength(r)) for r in rows), default=-12)
    lines = -(-len(images) // columns)
    sheet = Image.new("RGB", (margin + columns * (width + 4), lines * (height + under + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = margin + i % columns * (width + 4), i // columns * (height + under + 4)
        cell = image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(cell, (x, y), cell if cell.mode == "RGBA" else None)  # transparent on the sheet's white
        for n, line in enumerate(below[i].lines if captions else []):
            draw.text((x + indent, y + height + 2 + LINE * n), line, fill="black", font=below[i].font)
        if marks:
            _mark(draw, x + 1, y + height + 5, marks[i])
        if rows and i % columns == 0:
            draw.text((4, y + height // 2 - 6), rows[i // columns], fill="black", font=plain_font())
    return sheet


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Up to `SHEET` of the pictures, spread evenly over them, each above its caption.

    Pictures of different sizes are made to fit one square cell. ValueError for none, or another number of captions.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"one caption a picture, and one picture at least: got {len(images)} and {len(captions)}.")
    count = min(SHEET, len(images))
    chosen = [i * (len(images) - 1) // max(1, count - 1) for i in range(count)]
    shown = [images[i] for i in chosen]
    side = min(max(SMALLEST, *(max(image.size) for image in shown)), 2 * SMALLEST)
    if len({image.size for image in shown}) > 1 or max(shown[0].size) > side:
        shown = [ImageOps.pad(image.convert("RGBA"), (side, side), color="white") for image in shown]
    return grid(shown, math.isqrt(count - 1) + 1, captions=[captions[i] for i in chosen])


def comparison(rows: Mapping[str, Tensor]) -> Image.Image:
    """Named batches of uint8 (B,C,H,W) beneath each other, and twice the difference of the last two; RGBA on white."""
    import torch  # here alone: who packs pictures needs no more than Pillow

    from autoencoder.images import as_rgb

    rows = {name: as_rgb(pixels) for name, pixels in rows.items()}
    *_, given, ours = rows.values()
    error = (ours.int() - given.int()).abs().mul(2).clamp(max=255).byte()
    return grid(torch.cat([*rows.values(), error]), len(ours), rows=[*rows, "difference x2"])


def write(image: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Write a picture, whole: a PNG, or what the name ends in. Raises UserError (code 6) where the disk refuses."""
    form = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    with atomic_write(path) as file:
        image.save(file, form, pnginfo=info, compress_level=4)


def save(image: Image.Image, path: Path, facts: dict[str, Any]) -> None:
    """Write a PNG with `facts` (`finite` JSON) inside, sealed: `changed` tells whether either is another by now.

    Of a picture that was drawn, whose facts have `settings`, other programs read it in `parameters`.
    """
    info, told = PngInfo(), finite(facts)
    sealed = {**told, SEAL: seal(image, told)}
    info.add_itxt(KEY, json.dumps(sealed, ensure_ascii=False, sort_keys=True, allow_nan=False))
    if "settings" in facts:
        info.add_text(CHUNK, parameters(facts))  # of Latin letters tEXt, else iTXt
    write(image, path, info)


def facts(path: Path) -> dict[str, Any]:
    """How a picture was made; empty where it does not say. Raises ValueError where it says more than is written."""
    with Image.open(path, formats=["PNG"]) as image:
        said = getattr(image, "text", {}).get(KEY, "{}")
    if len(said) > LARGEST:
        raise ValueError(f"{len(said):,} characters")
    return json.loads(said)  # type: ignore[no-any-return]


def seal(image: Image.Image, facts: Mapping[str, Any]) -> str:
    """sha256 over pixels and facts."""
    said = json.dumps({key: value for key, value in facts.items() if key != SEAL}, sort_keys=True)
    return hashlib.sha256(f"{image.size} {said}".encode() + image.convert("RGB").tobytes()).hexdigest()


def changed(path: Path) -> bool | None:
    """Whether a picture, or what it says, is another than `save` wrote; None where it has no seal."""
    found = facts(path)
    with Image.open(path, formats=["PNG"]) as image:
        return None if SEAL not in found else found[SEAL] != seal(image, found)


def _mark(draw: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    """A green dot, or a red cross: apart by shape, too."""
    if right:
        draw.ellipse([x, y, x + 6, y + 6], fill="#228833")
        return
    for line in ([x, y, x + 6, y + 6], [x, y + 6, x + 6, y]):
        draw.line(line, fill="#cc3311", width=2)
