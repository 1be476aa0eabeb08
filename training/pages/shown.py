"""Pictures inside a page: as their files are where these are small, else as JPEG, made smaller until they fit."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image

from training.pictures import grids, html

FRAMES = 24  # pictures of a slider at most
LARGEST = 160_000  # bytes of one
LONGEST = 400  # characters of a caption that are shown


@dataclass(frozen=True)
class Shown:
    """A picture as the page holds it."""

    source: str  # data: URI
    size: tuple[int, int]  # of the file
    share: float = 1.0  # of the file's width


def shown(path: Path) -> Shown:
    """Raises OSError or ValueError for what is no picture."""
    about = path.stat()
    return _shown(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=2 * FRAMES)  # a training writes its page again and again, of the same pictures and one more
def _shown(path: Path, _changed: int, size: int) -> Shown:
    with Image.open(path, formats=["PNG"]) as image:
        whole = image.size
        if size <= LARGEST:
            image.verify()
            return Shown(_uri("png", path.read_bytes()), whole)
        picture = image.convert("RGB")
    while True:
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=85)
        if data.tell() <= LARGEST:
            return Shown(_uri("jpeg", data.getvalue()), whole, picture.width / whole[0])
        picture = picture.reduce(2)


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{b64encode(data).decode()}"


def image(path: Path, what: str, label: str = "") -> str:
    """The picture at `path` in the page, or what is wrong with it."""
    try:
        found = shown(path)
    except (OSError, ValueError, SyntaxError):  # Pillow raises the last for a damaged PNG
        return html.paragraph(f"{what}: the picture cannot be read")
    width, height = found.size
    data = f' data-label="{escape(label)}"' if label else ""
    return f'<img alt="{escape(what)}" width="{width}" height="{height}"{data} src="{found.source}">'


def chosen(labels: Sequence[str]) -> list[str]:
    """At most `FRAMES` of them, evenly, the first and the last included."""
    count = min(FRAMES, len(labels))
    return [labels[i * (len(labels) - 1) // max(1, count - 1)] for i in range(count)]


def slider(pictures: Mapping[str, Path], what: str) -> list[str]:
    """A slider over pictures by label, opened at the last; says how many are not in the page, or smaller in it."""
    labels = chosen(list(pictures))
    frames = {label: image(pictures[label], f"{what}, {label}", label) for label in labels}
    told = [html.paragraph(f"{what}, {label}: the picture cannot be read")
            for label, frame in frames.items() if not frame.startswith("<img")]  # fmt: skip
    sound = {label: frame for label, frame in frames.items() if frame.startswith("<img")}
    if left_out := len(pictures) - len(labels):
        told.append(html.paragraph(f"{left_out} of {len(pictures)} are left out here, evenly; all are in samples/."))
    reduced = [found for label in sound if "jpeg" in (found := shown(pictures[label])).source[:16]]
    if reduced:
        smaller = sum(found.share < 1 for found in reduced)
        told.append(html.paragraph(
            f"{len(reduced)} of these are JPEG here, {smaller} of them in fewer pixels; samples/ has the originals."
        ))  # fmt: skip
    if not sound:
        return told
    last = len(sound) - 1
    tools = (
        f'<label class="tools"><output>{escape(list(sound)[-1])}</output>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="{escape(what)}"></label>'
    )
    hidden = "".join(frame.replace("<img ", "<img hidden ", 1) for frame in list(sound.values())[:-1])
    return [f'<figure class="frames">{tools}{hidden}{list(sound.values())[-1]}</figure>', *told]


def captions(path: Path) -> list[str]:
    """The captions that a grid of drawings tells of itself; none where it does not."""
    try:
        found = grids.facts(path).get("captions", [])
    except (OSError, ValueError, SyntaxError, AttributeError):
        return []
    texts = found if isinstance(found, list) else []
    return [text if len(text) <= LONGEST else f"{text[:LONGEST]} …" for text in map(str, texts[:grids.SHEET])]
