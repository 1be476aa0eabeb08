"""Picture grids with captions, and the facts written into every PNG."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from training.files import atomic_write

SMALLEST = 96  # pixels a cell is enlarged to, so that small pictures can be seen
LARGEST = 1 << 20  # characters of the facts in a picture
SEAL = "sha256"  # among the facts: over all others and the pixels
KEY = "ldm"  # the PNG text chunk that holds how a picture was made


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """uint8 (B,3,H,W) -> pictures."""
    return [Image.fromarray(np.ascontiguousarray(p)) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def grid(
    pixels: Tensor | Sequence[Image.Image], columns: int, *, captions: Sequence[str] = (), rows: Sequence[str] = ()
) -> Image.Image:
    """Pictures in reading order, a caption under each or a label beside each row; small ones enlarged evenly."""
    images = to_pil(pixels) if isinstance(pixels, Tensor) else list(pixels)
    factor = max(1, -(-SMALLEST // max(images[0].size)))
    width, height = (side * factor for side in images[0].size)
    font = ImageFont.load_default(size=11)
    caption_lines = [textwrap.wrap(_drawable(c), max(8, width // 6))[:4] for c in captions]
    below = 4 + 13 * max(map(len, caption_lines), default=0) if captions else 0
    margin = 12 + max((int(font.getlength(r)) for r in rows), default=-12)
    lines = -(-len(images) // columns)
    sheet = Image.new("RGB", (margin + columns * (width + 4), lines * (height + below + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = margin + i % columns * (width + 4), i // columns * (height + below + 4)
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for n, line in enumerate(caption_lines[i] if captions else []):
            draw.text((x, y + height + 2 + 13 * n), line, fill="black", font=font)
        if rows and i % columns == 0:
            draw.text((4, y + height // 2 - 6), rows[i // columns], fill="black", font=font)
    return sheet


def comparison(rows: Mapping[str, Tensor]) -> Image.Image:
    """Named batches of uint8 (B,3,H,W) beneath each other, and twice the difference of the last two."""
    *_, given, ours = rows.values()
    error = (ours.int() - given.int()).abs().mul(2).clamp(max=255).byte()
    return grid(torch.cat([*rows.values(), error]), len(ours), rows=[*rows, "difference x2"])


def write(image: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Write a picture, whole: a PNG, or what the name ends in. Raises UserError (code 6) where the disk refuses."""
    form = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    with atomic_write(path) as file:
        image.save(file, form, pnginfo=info, compress_level=4)


def save(image: Image.Image, path: Path, facts: dict[str, Any]) -> None:
    """Write a PNG with `facts` (JSON) inside, sealed: `changed` tells whether either is another by now."""
    info = PngInfo()
    info.add_itxt(KEY, json.dumps({**facts, SEAL: seal(image, facts)}, ensure_ascii=False, sort_keys=True))
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


def _drawable(text: str) -> str:
    """Control characters would break lines where none are wanted."""
    return "".join(c if c.isprintable() else " " for c in text)
