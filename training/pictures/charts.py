"""Small line charts of shares, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIDE, LEFT, BELOW, ABOVE = 240, 44, 34, 24  # pixels: the square of the axes, and the room around it
TICKS = 5
INK, PALE, LINE = "black", (225, 225, 225), (30, 60, 220)


def curve(points: Sequence[tuple[float, float]], labels: Sequence[str], x: str, y: str) -> Image.Image:
    """Points (x, y) of [0, 1] joined in their order, each with its label, over named axes from 0 to 1."""
    sheet = Image.new("RGB", (LEFT + SIDE + 40, ABOVE + SIDE + BELOW), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for tick in range(TICKS + 1):
        across, down = place(tick / TICKS, 0), place(0, tick / TICKS)
        draw.line([across, place(tick / TICKS, 1)], fill=PALE)
        draw.line([down, place(1, tick / TICKS)], fill=PALE)
        draw.text((across[0], across[1] + 4), f"{tick / TICKS:.1f}", fill=INK, font=font, anchor="ma")
        draw.text((down[0] - 6, down[1]), f"{tick / TICKS:.1f}", fill=INK, font=font, anchor="rm")
    draw.line([place(0, 1), place(0, 0), place(1, 0)], fill=INK)
    draw.text((LEFT + SIDE // 2, ABOVE + SIDE + 18), x, fill=INK, font=font, anchor="ma")
    draw.text((4, 4), y, fill=INK, font=font)
    places = [place(*point) for point in points]
    draw.line(places, fill=LINE, width=2)
    for (left, top), label in zip(places, labels, strict=True):
        draw.ellipse((left - 3, top - 3, left + 3, top + 3), fill=LINE)
        draw.text((left + 6, top - 6), label, fill=INK, font=font, anchor="ls")
    return sheet


def place(x: float, y: float) -> tuple[int, int]:
    """The pixel (across, down) of a point."""
    return LEFT + round(x * SIDE), ABOVE + round((1 - y) * SIDE)
