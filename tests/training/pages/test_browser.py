"""The page in a browser: its script is allowed and nothing else, and what its sliders and boxes do is seen."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest
from run_folders import loss, run_folder

from training.pages.writing import one, several

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium.launched() as found:
        yield found


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The page of a run of 40 steps; whatever the console says of violations or errors fails the test."""
    (tmp_path / "page.html").write_bytes(one(run_folder(tmp_path / "run")))
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.extend([] if request.url[:5] in ("file:", "data:") else [request.url]))
    page.goto((tmp_path / "page.html").as_uri())
    yield page
    page.close()
    assert said == []


def move(page: Any, slider: str, value: float) -> None:
    page.locator(slider).fill(str(value))


def heights(page: Any, title: str, kind: str = "line") -> list[float]:
    """The y of the points of a line, in pixels downwards."""
    figure = page.locator("figure.plot").filter(has=page.get_by_role("heading", name=re.compile(f"^{title}")))
    path = figure.locator(f"path.{kind}").first.get_attribute("d")
    return [float(y) for _, y in re.findall(r"[ML](\S+) ([\d.]+)", path)]


def test_smoothing_is_the_debiased_average(opened: Any) -> None:
    """m_n = w m_(n-1) + (1 - w) y_n, s_n = m_n / (1 - w^n): constants stay what they are, and w = 0 changes nothing."""
    values, weight = [loss(n) for n in range(1, 41)], 0.9
    mean, expected = 0.0, []
    for n, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        expected.append(mean / (1 - weight**n))
    assert opened.evaluate(f"smoothed({values}, {weight})") == pytest.approx(expected)
    assert opened.evaluate("smoothed([3, 3, 3], 0.99)") == pytest.approx([3, 3, 3])
    assert opened.evaluate("smoothed([1, 5, 2], 0)") == [1, 5, 2]


def test_the_smoothing_slider_moves_training_curves_alone(opened: Any) -> None:
    move(opened, "#smoothing", 0)
    sharp, validation = heights(opened, "Training loss"), heights(opened, "Validation loss")
    move(opened, "#smoothing", 0.9)
    smooth = heights(opened, "Training loss")
    assert smooth[0] == sharp[0] and all(above < below for above, below in zip(smooth[1:], sharp[1:], strict=True))
    assert heights(opened, "Training loss", "raw") == sharp and heights(opened, "Validation loss") == validation


def test_the_axis_is_as_the_box_says(opened: Any) -> None:
    """The highest loss at the top, the lowest at the bottom, between them by its logarithm or by itself."""
    move(opened, "#smoothing", 0)
    log = opened.locator("figure.plot h3 input").first
    found = {}
    for name in ("log", "linear"):
        log.set_checked(name == "log")
        found[name] = heights(opened, "Training loss")
    top, bottom, losses = found["log"][0], found["log"][-1], [loss(n) for n in range(1, 41)]
    for name, height in (("log", math.log), ("linear", float)):
        low, high = height(losses[-1]), height(losses[0])
        shares = [(bottom - y) / (bottom - top) for y in found[name]]
        assert shares == pytest.approx([(height(value) - low) / (high - low) for value in losses], abs=2e-3)


def test_the_slider_of_samples_shows_one_at_a_time(opened: Any) -> None:
    frames = opened.locator("figure.frames")
    assert frames.locator("output").inner_text() == "step 40"
    for place, step in enumerate((0, 20, 40)):
        move(opened, "figure.frames input", place)
        visible = [picture.get_attribute("alt") for picture in frames.locator("img").all() if picture.is_visible()]
        assert visible == [f"samples, step {step}"] and frames.locator("output").inner_text() == f"step {step}"


def test_pointing_at_a_curve_tells_its_value(opened: Any) -> None:
    figure = opened.locator("figure.plot").first
    assert "loss: 2.025" in figure.locator(".legend").inner_text()
    figure.locator("svg").hover(position={"x": 1, "y": 20})
    assert "step 1" in figure.locator(".legend").inner_text() and "loss: 3" in figure.locator(".legend").inner_text()


def test_no_page_is_wider_than_its_window(opened: Any) -> None:
    for width in (1200, 390):
        opened.set_viewport_size({"width": width, "height": 800})
        assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_runs_are_drawn_over_each_other(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_bytes(several([run_folder(tmp_path / name) for name in "ab"]))
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    first = page.locator("figure.plot").first
    assert first.locator("path.line").count() == 2
    assert first.locator(".legend span").all_inner_texts() == ["a: 2.025", "b: 2.025"]
    page.close()
