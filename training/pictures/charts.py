"""Charts that need no more than Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from training.pictures.captions import plain_font

SIDE = 300  # pixels of the unit square
MARGIN = 40
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # apart for the colour-blind: Paul Tol


def unit_square(curves: Mapping[str, Sequence[Sequence[float]]], across: str, up: str,
                diagonal: bool = True) -> Image.Image:
    """Named curves of points (x, y) in [0, 1], the diagonal beneath them, and what both axes are."""
    font = plain_font()
    wide = max((int(font.getlength(name)) for name in curves), default=0)
    chart = Image.new("RGB", (SIDE + 2 * MARGIN + 30 + wide, SIDE + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(chart)

    def at(x: float, y: float) -> tuple[float, float]:
        return MARGIN + x * SIDE, MARGIN + (1 - y) * SIDE

    draw.rectangle([at(0, 1), at(1, 0)], outline="black")
    if diagonal:
        draw.line([at(0, 0), at(1, 1)], fill="grey")
    for tick in (0.0, 0.5, 1.0):
        draw.text(at(tick, 0), f"{tick:g}", fill="black", font=font, anchor="mt")
        draw.text(at(0, tick), f"{tick:g} ", fill="black", font=font, anchor="rm")
    draw.text((MARGIN + SIDE // 2, MARGIN + SIDE + 18), across, fill="black", font=font, anchor="mt")
    draw.text((MARGIN, MARGIN - 18), up, fill="black", font=font, anchor="lt")
    for place, (name, points) in enumerate(curves.items()):
        colour, row = COLOURS[place % len(COLOURS)], MARGIN + 8 + 16 * place
        draw.line([at(*point) for point in points], fill=colour, width=2)
        for x, y in (at(*point) for point in points):
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        draw.line([(MARGIN + SIDE + 8, row), (MARGIN + SIDE + 24, row)], fill=colour, width=2)
        draw.text((MARGIN + SIDE + 30, row), name, fill="black", font=font, anchor="lm")
    return chart


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures beneath each other, on white."""
    sheet = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet
