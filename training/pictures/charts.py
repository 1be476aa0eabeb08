"""Charts that need no more than Pillow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

from training.pictures.captions import plain_font

SIDE = 300  # pixels of the unit square
MARGIN = 40
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # apart for the colour-blind: Paul Tol
FAINT = "#dddddd"
NICE = (1, 2, 5)  # what a tick begins with
MOST = 7  # ticks of an axis
ROOM = 0.08  # of an axis, free at either end


class Spot(NamedTuple):
    """A measured point, the interval of its height, and what is written beside it."""

    x: float
    y: float
    low: float
    high: float
    label: str = ""


@dataclass(frozen=True)
class Axis:
    """What an axis is of, its ends, and whether it is logarithmic, which ends above 0 can be."""

    name: str
    low: float
    high: float
    log: bool = False

    @staticmethod
    def around(name: str, values: Iterable[float], log: bool = False) -> Axis:
        """One with room for all values; of a logarithmic one those above 0."""
        seen = [value for value in values if value > 0 or not log] or [1.0]
        low, high = (math.log(end) if log else end for end in (min(seen), max(seen)))
        room = ROOM * (high - low) or 0.5
        low, high = low - room, high + room
        return Axis(name, math.exp(low), math.exp(high), True) if log else Axis(name, low, high)

    def place(self, value: float) -> float:
        """Where a value stands, from 0 to 1; what lies beyond an end stands there."""
        if self.log:
            value = max(value, self.low)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    def ticks(self) -> list[float]:
        """Round values on it."""
        if not self.log:
            fine = (self.high - self.low) / MOST
            step = next(s for s in _round(fine, 10 * fine) if s >= fine)
            return [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        found = [value for value in _round(self.low, self.high) if self.low <= value <= self.high]
        tens = [value for value in found if math.log10(value).is_integer()]
        return tens if len(found) > MOST and len(tens) > 1 else found


def _round(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from below `low` to above `high` > 0, in order."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [float(f"{digit}e{power}") for power in powers for digit in NICE]


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


def panel(lines: Mapping[str, Sequence[Spot]], across: Axis, up: Axis, level: float | None = None) -> Image.Image:
    """Named lines of points, each with its interval as a bar, between two axes; a dashed line at the height `level`.
    `legend` has their names."""
    chart = Image.new("RGB", (SIDE + 2 * MARGIN, SIDE + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(chart)

    def at(x: float, y: float) -> tuple[int, int]:
        return MARGIN + round(across.place(x) * SIDE), MARGIN + round((1 - up.place(y)) * SIDE)

    _axes(draw, across, up)
    if level is not None:
        _dash(draw, at(across.low, level), SIDE)
    for number, points in enumerate(lines.values()):
        colour = COLOURS[number % len(COLOURS)]
        rises = points[-1].y >= points[0].y
        corner = (-1, -1 if rises else 1) if number % 2 == 0 else (1, 1 if rises else -1)  # where the line is not
        anchor = ("l" if corner[0] > 0 else "r") + ("t" if corner[1] > 0 else "b")
        draw.line([at(point.x, point.y) for point in points], fill=colour, width=2)
        for point in points:
            (x, y), (_, low), (_, high) = (at(point.x, height) for height in (point.y, point.low, point.high))
            draw.line([(x, low), (x, high)], fill=colour)
            for end in (low, high):
                draw.line([(x - 3, end), (x + 3, end)], fill=colour)
            _mark(draw, number, x, y)
            place = (x + 5 * corner[0], y + 3 * corner[1])
            draw.text(place, point.label, fill=colour, font=plain_font(), anchor=anchor)
    return chart


def _axes(draw: ImageDraw.ImageDraw, across: Axis, up: Axis) -> None:
    """The frame, a faint line at each tick, and what both axes are."""
    font, end = plain_font(), MARGIN + SIDE
    for tick in across.ticks():
        x = MARGIN + round(across.place(tick) * SIDE)
        draw.line([(x, MARGIN), (x, end)], fill=FAINT)
        draw.text((x, end + 2), f"{tick:g}", fill="black", font=font, anchor="mt")
    for tick in up.ticks():
        y = MARGIN + round((1 - up.place(tick)) * SIDE)
        draw.line([(MARGIN, y), (end, y)], fill=FAINT)
        draw.text((MARGIN, y), f"{tick:g} ", fill="black", font=font, anchor="rm")
    draw.rectangle([MARGIN, MARGIN, end, end], outline="black")
    draw.text((MARGIN + SIDE // 2, end + 18), across.name, fill="black", font=font, anchor="mt")
    draw.text((MARGIN, MARGIN - 18), up.name, fill="black", font=font, anchor="lt")


def _dash(draw: ImageDraw.ImageDraw, start: tuple[int, int], width: int) -> None:
    x, y = start
    for place in range(0, width, 8):
        draw.line([(x + place, y), (x + place + 4, y)], fill="grey")


def _mark(draw: ImageDraw.ImageDraw, number: int, x: int, y: int) -> None:
    """The mark of the line of that number: lines of one colour differ in it."""
    colour, shape = COLOURS[number % len(COLOURS)], number // len(COLOURS) % 3
    if shape == 0:
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
    elif shape == 1:
        draw.rectangle([x - 3, y - 3, x + 3, y + 3], fill=colour)
    else:
        draw.polygon([(x, y - 4), (x + 4, y + 3), (x - 4, y + 3)], fill=colour)


def legend(names: Sequence[str], more: str = "") -> Image.Image:
    """The names of a panel's lines, each with its mark; `more` is what the dashed line is."""
    font, rows = plain_font(), [*names, *([more] if more else [])]
    wide = max((int(font.getlength(name)) for name in rows), default=0)
    key = Image.new("RGB", (wide + 40, max(SIDE + 2 * MARGIN, 2 * MARGIN + 16 * len(rows))), "white")
    draw = ImageDraw.Draw(key)
    for number, name in enumerate(rows):
        y = MARGIN + 8 + 16 * number
        if number < len(names):
            draw.line([(0, y), (16, y)], fill=COLOURS[number % len(COLOURS)], width=2)
            _mark(draw, number, 8, y)
        else:
            _dash(draw, (0, y), 16)
        draw.text((22, y), name, fill="black", font=font, anchor="lm")
    return key


def abreast(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures beside each other, on white."""
    sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures beneath each other, on white."""
    sheet = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet
