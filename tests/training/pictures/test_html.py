"""A chart's points, lines and numbers, each where the eye expects it."""

from __future__ import annotations

import re
from base64 import b64decode
from io import BytesIO

import pytest
from PIL import Image

from training.pictures import html

RIGHT, BOTTOM = html.WIDTH - 10, html.HEIGHT - html.BELOW
POINT = r"(-?[\d.]+),(-?[\d.]+)"


def lines(chart: str) -> list[list[tuple[float, float]]]:
    """The points of each line in pixels: x to the right, y downwards."""
    found = re.findall(r'<polyline points="([^"]*)"', chart)
    return [[(float(x), float(y)) for x, y in re.findall(POINT, points)] for points in found]


def labels(chart: str, anchor: str) -> list[tuple[float, float, str]]:
    """(x, y, text) of the numbers along one axis."""
    found = re.findall(rf'<text x="([\d.]+)" y="([\d.]+)" text-anchor="{anchor}">([^<]*)<', chart)
    return [(float(x), float(y), text) for x, y, text in found]


def test_more_is_higher_and_later_is_further_right() -> None:
    """The lowest value lies on the bottom line and the highest at the top, also of several lines together."""
    chart = html.chart({"a": [(0.0, 0.0), (5.0, 10.0), (10.0, 2.5)], "b": [(0.0, 5.0)]}, "x", "y")
    left = float(html.LEFT)
    middle = (html.LEFT + RIGHT) / 2
    (first, second) = lines(chart)
    assert first == [(left, BOTTOM), (middle, 10.0), (RIGHT, pytest.approx(10 + 0.75 * (BOTTOM - 10)))]
    assert second == [(left, pytest.approx((10 + BOTTOM) / 2))]


def test_the_numbers_of_an_axis_stand_at_their_places() -> None:
    chart = html.chart({"a": [(100.0, 0.0), (300.0, 8.0)]}, "time", "loss")
    up = [(y - 4, text) for _, y, text in labels(chart, "end")]
    assert up == [(BOTTOM - share * (BOTTOM - 10), f"{8 * share:.3g}") for share in (0, 0.25, 0.5, 0.75, 1)]
    across = [(x, text) for x, _, text in labels(chart, "middle")][:5]
    step = (RIGHT - html.LEFT) / 4
    assert across == [(pytest.approx(html.LEFT + n * step), f"{100 + 50 * n}") for n in range(5)]
    assert labels(chart, "middle")[5][2] == "time" and ">loss</text>" in chart


def test_lines_are_told_apart_by_name_and_colour() -> None:
    chart = html.chart({name: [(0.0, float(n)), (1.0, 1.0)] for n, name in enumerate("abc")}, "", "")
    drawn = re.findall(r'fill="none" stroke="(#\w+)"', chart)
    named = re.findall(r'fill="(#\w+)">([abc])</text>', chart)
    assert drawn == list(html.COLOURS[:3]) and named == list(zip(drawn, "abc", strict=True))


def test_one_value_is_drawn_in_the_middle() -> None:
    ((point,),) = lines(html.chart({"a": [(3.0, 7.0)]}, "", ""))
    assert point == ((html.LEFT + RIGHT) / 2, (10 + BOTTOM) / 2)


def test_a_table_tells_numbers_to_four_digits_row_by_row() -> None:
    found = html.table(("name", "mean"), [["a", 0.123456], ["b", None], ["c", 7]])
    assert re.findall(r"<th>([^<]*)</th>", found) == ["name", "mean"]
    cells = [re.findall(r"<td>([^<]*)</td>", row) for row in found.split("<tr>")[2:]]
    assert cells == [["a", "0.1235"], ["b", "–"], ["c", "7"]]


def test_a_picture_is_in_the_page_itself() -> None:
    image = Image.new("RGB", (3, 2), (10, 20, 30))
    image.putpixel((2, 0), (200, 0, 0))
    found = html.picture(image, "a < b")
    data = re.search(r'^<img alt="a &lt; b" src="data:image/png;base64,([^"]*)">$', found)
    assert data is not None
    assert Image.open(BytesIO(b64decode(data[1]))).tobytes() == image.tobytes()
