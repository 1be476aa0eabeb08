"""One self-contained HTML page: tables, line charts and pictures; all text escaped, nothing loaded from elsewhere."""

from __future__ import annotations

import hashlib
import io
import json
import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from training.errors import PACKAGE

GENERATOR = f'<meta name="generator" content="{PACKAGE}">'  # by which pages of ours are known
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser holds the page to the docstring
STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:66em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:.5em 0}td,th{padding:.15em .8em;border-bottom:1px solid #ddd;"
    "text-align:right;font-variant-numeric:tabular-nums}td:first-child,th:first-child{text-align:left}"
    "nav a{margin-right:1em}img{max-width:100%}svg{display:block;font:12px sans-serif}p{max-width:48em}"
)
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
WIDTH, HEIGHT, LEFT, BELOW = 560, 260, 64, 40  # of a chart, and of the margins that hold its numbers


def page(
    title: str, sections: Mapping[str, Sequence[str]], *, lead: str = "", style: str = STYLE, script: str = ""
) -> str:
    """A whole document from HTML parts by heading, `lead` before the first; `script` is the only one that may run."""
    names = {name: f"part-{number}" for number, name in enumerate(sections)}
    parts = (f'<h2 id="{names[name]}">{escape(name)}</h2>{"".join(parts)}' for name, parts in sections.items())
    links = "".join(f'<a href="#{place}">{escape(name)}</a>' for name, place in names.items())
    policy = f"{POLICY}; script-src 'sha256-{_sha256(script)}'" if script else POLICY
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{style}</style></head><body><h1>{escape(title)}</h1>{lead}<nav>{links}</nav>{''.join(parts)}"
        f"{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def _sha256(text: str) -> str:
    """As a content security policy names a script: base64."""
    return b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded(value: Any) -> str:
    """Plain data for a script of the page: JSON in an element that nothing runs and no text of it can close."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def paragraph(text: str) -> str:
    """One paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def items(lines: Iterable[str], kind: str = "") -> str:
    """A list of plain texts, of the class `kind`; nothing where there are none."""
    told = "".join(f"<li>{escape(line)}</li>" for line in lines)
    of_kind = f' class="{kind}"' if kind else ""
    return f"<ul{of_kind}>{told}</ul>" if told else ""


def facts(rows: Mapping[str, Any]) -> str:
    """A table of names and what they are."""
    lines = (f"<tr><td>{escape(name)}</td><td>{escape(cell_text(value))}</td></tr>" for name, value in rows.items())
    return f'<div class="scroll"><table class="facts">{"".join(lines)}</table></div>'


def folded(title: str, *parts: str) -> str:
    """HTML parts behind their title, opened by a click."""
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def verbatim(text: str) -> str:
    """Plain text with its line breaks."""
    return f"<pre>{escape(text)}</pre>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers to four digits, a dash for None."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ("".join(f"<td>{escape(cell_text(value))}</td>" for value in row) for row in rows)
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def cell_text(value: Any) -> str:
    """A table's cell, unescaped."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def picture(image: Image.Image, what: str) -> str:
    """The image itself, as PNG inside the page."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{b64encode(data.getvalue()).decode()}">'


def chart(lines: Mapping[str, Sequence[tuple[float, float | None]]], across: str, up: str) -> str:
    """Lines of (x, y) as SVG, with their names; points without a finite y are left out."""
    points = {name: [(x, y) for x, y in line if y is not None and math.isfinite(y)] for name, line in lines.items()}
    every = [point for line in points.values() for point in line]
    if not every:
        return ""
    (x0, x1), (y0, y1) = (_range([point[axis] for point in every]) for axis in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - 10), 10 + (y1 - y) / (y1 - y0) * (HEIGHT - BELOW - 10)

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(x0 + share * (x1 - x0), y0 + share * (y1 - y0))
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 10}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{y0 + share * (y1 - y0):.3g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 24}" text-anchor="middle">{x0 + share * (x1 - x0):.3g}</text>')
    for index, (name, line) in enumerate(points.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(x, y) for x, y in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH + 4}" y="{20 + 18 * index}" fill="{colour}">{escape(name)}</text>')
    parts.append(f'<text x="{WIDTH // 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>')
    parts.append(f'<text x="{WIDTH + 4}" y="{HEIGHT - BELOW}">{escape(up)}</text>')
    return f'<svg width="{WIDTH + 240}" height="{HEIGHT}" role="img">{"".join(parts)}</svg>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest, never the same."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
