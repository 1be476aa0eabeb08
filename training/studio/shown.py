"""What the page shows of drawings and pictures, as HTML: all text escaped, small pictures enlarged without blur."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from training.drawing.given import given
from training.drawing.replay import told_by
from training.errors import UserError
from training.ledger import Ledger
from training.pictures import grids, html
from training.studio.model import Made

THUMB = 512  # pixels of the longer side that a shown copy has at most
TOLD = "What was not used as it was given"


def made(result: Made) -> str:
    """What a drawing took, what of it was not used as given, and what its pictures say."""
    count = len(result.pictures)
    took = f"{count} picture{'s' if count > 1 else ''} in {result.seconds:.1f} s, {result.calls} network calls"
    return html.paragraph(took) + notes(result.told) + facts(result.facts)


def notes(lines: Sequence[str]) -> str:
    """A list under the word that these things were not used as given; nothing where there are none."""
    return f'<div class="told"><b>{TOLD}</b>{html.items(lines)}</div>' if lines else ""


def facts(said: Mapping[str, Any]) -> str:
    """The most asked of what a picture says as a table, and all of it folded."""
    every = html.verbatim(json.dumps(said, ensure_ascii=False, indent=1, sort_keys=True))
    table = html.table(("the picture says", ""), _rows(said))
    return table + html.folded("everything that the PNG says", every)


def _rows(said: Mapping[str, Any]) -> list[tuple[str, Any]]:
    settings = said["settings"]
    sampler, grid, guidance, sample = (settings.get(name, {}) for name in ("sampler", "grid", "guidance", "sample"))
    steered = f"{guidance.get('kind')}, scale {html.cell_text(guidance.get('scale'))}"
    rows = [
        ("caption", said["prompt"]), ("negative", said["negative_prompt"]), ("seed", said["seed"]),
        ("size", "x".join(map(str, said["size"]))), ("sampler", sampler.get("kind")), ("steps", sample.get("steps")),
        ("grid", grid.get("kind")), ("guidance", steered), ("few-step model", _student(said.get("student"))),
        ("hash of the denoiser", str(said["hashes"].get("denoiser", ""))[:16]),
    ]
    return [(name, value) for name, value in rows if value not in ("", None)]


def _student(told: Any) -> str:
    """What a picture says of how its few-step model was taught, which anyone may have written."""
    if not isinstance(told, Mapping):
        return ""
    teacher, scales = told.get("teacher"), html.cell_text(told.get("guidance_scale") or "none")
    by = f", taught by {html.cell_text(teacher.get('name'))}" if isinstance(teacher, Mapping) else ""
    return f"guidance scale in it: {scales}{by}"


def compared(rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], Made | str]) -> str:
    """A table of drawings, or of why there is none: samplers downwards, scales of guidance across."""
    head = "".join(f'<th scope="col">guidance {escape(column)}</th>' for column in columns)
    lines = "".join(
        f'<tr><th scope="row">{escape(row)}</th>{"".join(_cell(cells.get((row, c)), row, c) for c in columns)}</tr>'
        for row in rows
    )
    return f'<div class="compare"><table><tr><th></th>{head}</tr>{lines}</table></div>'


def _cell(drawn: Made | str | None, row: str, column: str) -> str:
    if not isinstance(drawn, Made):
        return f"<td>{escape(drawn or '')}</td>"
    pictures = "".join(picture(path, f"{row}, guidance {column}, {path.stem}") for path in drawn.pictures)
    return f"<td>{pictures}<br>{drawn.calls} calls, {drawn.seconds:.2f} s</td>"


def picture(path: Path, what: str) -> str:
    """A picture file of ours within the page, at most `THUMB` pixels to a side."""
    with Image.open(path) as image:
        return html.picture(thumb(image), what)


def thumb(image: Image.Image) -> Image.Image:
    """A copy that is not larger than need be."""
    copy = image.copy()
    copy.thumbnail((THUMB, THUMB))
    return copy


def uploaded(path: Path) -> Image.Image:
    """A picture file of the user's, RGB. Raises UserError for what is no picture."""
    return given("picture", str(path), Ledger())[0].decoded(3, Ledger())


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) of a picture file of the user's. Raises UserError for what is no picture."""
    width, height = given("picture", str(path), Ledger())[0].size
    return height, width


def caption_of(path: str | None) -> str:
    """The caption that a picture of ours says; empty for any other file."""
    try:
        return str(told_by(Path(path))["prompt"]) if path else ""
    except UserError:
        return ""


def preview(path: Path) -> str:
    """A picture file of the user's as it is read, enlarged, with its name and size. Raises UserError for none."""
    image = uploaded(path)
    named = html.paragraph(f"{path.name}: {image.width} x {image.height} pixels")
    return html.picture(enlarged(image, 160), "the given picture") + named


def enlarged(image: Image.Image, side: int = THUMB) -> Image.Image:
    """By a whole factor, without blur, to about `side` pixels; a larger picture is made smaller."""
    if max(image.size) > side:
        return thumb(image)
    factor = max(1, side // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def sheet(cells: Mapping[tuple[str, str], Made | str], path: Path) -> Path:
    """The drawings of a comparison in one picture, each with its sampler and scale."""
    drawn = [(f"{row}, {column}", p) for (row, column), m in cells.items() if isinstance(m, Made) for p in m.pictures]
    first = next(m for m in cells.values() if isinstance(m, Made))
    across = len({column for _, column in cells}) * len(first.pictures)
    images = [Image.open(p).copy() for _, p in drawn]
    grids.write(grids.grid(images, across, captions=[label for label, _ in drawn]), path)
    return path
