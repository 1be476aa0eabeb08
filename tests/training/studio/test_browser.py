"""Every tab of the studio, clicked through in Chromium: what a user sees, and that nothing is asked of other hosts."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import chromium
import numpy as np
import pytest
import tiny
from PIL import Image

from training.pictures import grids

pytestmark = pytest.mark.browser
CAPTION = "a red circle above a blue square"


@contextmanager
def served(home: Path, ended_by: signal.Signals, code: int) -> Iterator[str]:
    """The address of a studio of the demo, a process of its own, whose end by a signal leaves nothing behind."""
    folders = [home / name for name in ("work", "scratch")]
    for folder in folders:
        folder.mkdir()
    command = [sys.executable, str(tiny.SCRIPTS / "studio.py"), "--model", "demo", "--port", "0", "--device", "cpu"]
    environment = tiny.ENVIRONMENT | {"PYTHONPATH": str(tiny.ROOT), "TMPDIR": str(folders[1])}
    with (home / "log").open("w") as log, subprocess.Popen(
            command, cwd=folders[0], env=environment, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout
        if not (url := process.stdout.readline().strip()):
            pytest.fail((home / "log").read_text())
        try:
            yield url
            process.send_signal(ended_by)
            assert process.wait(60) == code
        finally:
            process.kill()
    said = (home / "log").read_text()
    assert "Traceback" not in said and "error" not in said, said
    assert not list(folders[0].iterdir()) and not list(folders[1].glob("studio-*"))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("studio"), signal.SIGTERM, 143) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium.launched() as found:
        yield found


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The studio's page. At the end: everything it asked for was asked of this machine, and no script failed."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    page, asked, failed = context.new_page(), list[str](), list[str]()
    page.set_default_timeout(60_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(address)
    page.get_by_role("tab", name="Draw").wait_for()
    yield page
    context.close()
    assert len(asked) > 20 and failed == []
    assert {urlsplit(url).hostname for url in asked if urlsplit(url).scheme not in ("data", "blob")} == {"127.0.0.1"}


def tab(page: Any, name: str) -> Any:
    """A tab, opened."""
    page.get_by_role("tab", name=name, exact=True).click()
    return page.locator("[role=tabpanel]:visible")


def few_steps(panel: Any, steps: int = 2) -> None:
    """Set the steps."""
    panel.get_by_role("button", name="Sampler and guidance").click()
    panel.get_by_label("number input for Steps").fill(str(steps))


def draw(page: Any, caption: str = CAPTION) -> Any:
    """The tab Draw, after four pictures of few steps."""
    panel = tab(page, "Draw")
    panel.get_by_label("Caption").first.fill(caption)
    few_steps(panel)
    panel.get_by_role("button", name="Draw", exact=True).click()
    panel.get_by_text(re.compile("^4 pictures in")).wait_for()
    return panel


def download(page: Any, panel: Any, name: str, folder: Path) -> Path:
    """A file that the tab offers, as it arrives."""
    with page.expect_download() as arriving:
        panel.locator(".file-preview tr").filter(has=page.locator(f'td[aria-label="{name}"]')).locator("a").last.click()
    arriving.value.save_as(folder / name)
    return folder / name


def take_last(panel: Any) -> None:
    panel.get_by_role("button", name="Take the last drawn picture").click()
    panel.get_by_text("32 x 32 pixels").wait_for()


def test_draw(page: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    panel = draw(page, "a red <b>zebra</b>")
    assert panel.locator(".grid-wrap img").count() == 4
    image = panel.locator(".grid-wrap img").first
    assert image.bounding_box()["width"] > 200
    assert image.evaluate("i => getComputedStyle(i).imageRendering") == "pixelated"
    assert panel.locator(".told").inner_text().endswith("read as unknown (<, b, >, zebra, / …)")
    assert "a red <b>zebra</b>" in panel.locator("table").first.inner_text()
    command = panel.locator(".command textarea").input_value()
    assert "--prompt 'a red <b>zebra</b>' --num-images 4 --seed 0" in command and "--steps 2" in command
    path = download(page, panel, "00002.png", tmp_path)
    assert grids.facts(path)["seed"] == 2 and grids.changed(path) is False
    again = ("--model", "demo", "--like", path, "--output", tmp_path / "again", "--device", "cpu")
    assert tiny.call("generate", *again) == 0
    assert f"the same pixels as {path}" in capsys.readouterr().err


def test_edit_the_picture_that_was_clicked_on(page: Any, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    draw(page).locator(".grid-wrap img").nth(3).click()
    page.wait_for_timeout(2000)  # what was clicked on is told to the studio, and shows nowhere
    panel = tab(page, "Edit")
    take_last(panel)
    expect(panel.get_by_label("Caption").first).to_have_value(CAPTION, timeout=30_000)
    few_steps(panel)
    panel.get_by_role("button", name="Draw it again").click()
    panel.get_by_text("network calls").wait_for()
    facts = grids.facts(download(page, panel, "00000.png", tmp_path))["image"]
    assert facts["strength"] == 0.6 and re.fullmatch(r"\d{4}-00003\.png", facts["name"])


def test_inpaint_what_is_brushed(page: Any, tmp_path: Path) -> None:
    draw(page)
    panel = tab(page, "Inpaint")
    take_last(panel)
    panel.locator("canvas").first.scroll_into_view_if_needed()
    page.wait_for_timeout(1500)  # the canvas is laid out anew
    box = panel.locator("canvas").first.bounding_box()
    across, down = box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5
    page.mouse.move(across - 40, down)
    page.mouse.down()
    page.mouse.move(across + 40, down, steps=8)
    page.mouse.up()
    page.wait_for_timeout(500)
    few_steps(panel)
    panel.get_by_role("button", name="Fill the hole").click()
    panel.get_by_text("network calls").wait_for()
    (source,) = {name for cell in panel.locator("td.filename").all()
                 if re.fullmatch(r"\d{4}-00000\.png", name := cell.get_attribute("aria-label"))}
    names = ("00000.png", source, f"{source[:-4]}-mask.png")
    made, given, mask = (np.asarray(Image.open(download(page, panel, name, tmp_path))) for name in names)
    hole = mask == 255
    assert 8 < hole.sum() < 400 and hole[14:18, 14:18].any() and not hole[:4].any()
    assert (made[~hole] == given[~hole]).all() and (made[hole] != given[hole]).any()


def test_restore_an_upload(page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "navy").save(tmp_path / "<i>navy.png")
    panel = tab(page, "Restore")
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "<i>navy.png")
    panel.get_by_text("40 x 40 pixels").wait_for()
    few_steps(panel)
    panel.get_by_role("button", name="Restore", exact=True).click()
    panel.get_by_text("network calls").wait_for()
    assert "its middle resized to 32x32" in panel.locator(".told").inner_text()
    facts = grids.facts(download(page, panel, "00001.png", tmp_path))["restore"]
    assert facts["kinds"]["operator"]["kind"] == "box" and facts["kinds"]["measurement"]["kind"] == "ddnm"


def test_compare(page: Any) -> None:
    panel = tab(page, "Compare")
    panel.get_by_label("number input for Steps").fill("2")
    panel.get_by_role("button", name="Compare", exact=True).click()
    panel.get_by_text(re.compile("^6 drawings, 12 network calls")).wait_for()
    assert panel.locator(".compare th").all_inner_texts() == [
        "", "guidance 1", "guidance 3", "guidance 6", "dpmpp-2m", "euler"]
    assert panel.locator(".compare img").count() == 12
    assert all(re.search(r"2 calls, [\d.]+ s$", cell) for cell in panel.locator(".compare td").all_inner_texts())


def test_facts_of_a_drawn_picture_and_of_others(page: Any, tmp_path: Path) -> None:
    draw(page)
    panel = tab(page, "Facts")
    take_last(panel)
    panel.get_by_text("It is as it was made, facts and pixels.").wait_for()
    assert panel.get_by_text("The open model made it.").is_visible()
    assert "--like" in panel.locator(".command textarea").input_value()
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    panel.get_by_label("Remove").or_(panel.get_by_label("Clear")).first.click()
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "bare.png")
    panel.get_by_text("bare.png does not say how it was made.").wait_for()
    assert not panel.locator(".command").is_visible()


def test_mistakes_are_one_sentence(page: Any, tmp_path: Path) -> None:
    (tmp_path / "<img src=x onerror=alert(1)>.png").write_text("no picture")
    panel = tab(page, "Draw")
    panel.get_by_label("Size").first.fill("33")
    panel.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("size 33 (height x width) is not divisible by 8").wait_for()
    panel = tab(page, "Edit")
    panel.get_by_role("button", name="Take the last drawn picture").click()
    page.get_by_text("nothing was drawn yet: draw first, or upload a picture").wait_for()
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "<img src=x onerror=alert(1)>.png")
    page.get_by_text("not an image of a known format").first.wait_for()
    assert page.locator("img[src='x']").count() == 0 and "Traceback" not in page.content()


def begin_long(page: Any) -> Any:
    """Begins a drawing of minutes in the tab Draw, which it gives."""
    panel = tab(page, "Draw")
    panel.get_by_label("number input for Pictures").fill("64")
    few_steps(panel, 200)
    panel.get_by_role("button", name="Draw", exact=True).click()
    panel.get_by_text(re.compile("step [1-9]")).first.wait_for()
    return panel


def test_a_long_drawing_is_stopped(page: Any) -> None:
    panel = begin_long(page)
    panel.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped; nothing of it was kept").wait_for()
    assert panel.locator(".grid-wrap img").count() == 0


def test_a_page_that_is_closed_stops_its_drawing(page: Any, browser: Any, address: str) -> None:
    other = browser.new_page()
    other.goto(address)
    begin_long(other)
    other.close()
    draw(page)


def test_a_drawing_that_waits_for_another_page_is_stopped(page: Any, browser: Any, address: str) -> None:
    other = browser.new_page()
    other.goto(address)
    begin_long(other)
    panel = tab(page, "Draw")
    panel.get_by_role("button", name="Draw", exact=True).click()
    page.wait_for_timeout(2000)  # until it waits
    panel.get_by_role("button", name="Stop").click()
    other.close()
    page.get_by_text("stopped before it began").wait_for()
    assert panel.locator(".grid-wrap img").count() == 0


def test_at_800_pixels_nothing_is_cut_off(page: Any) -> None:
    page.set_viewport_size({"width": 800, "height": 1000})
    for name in ("Draw", "Edit", "Inpaint", "Restore", "Compare", "Facts"):
        tab(page, name)
        time.sleep(0.2)
        assert page.evaluate("document.documentElement.scrollWidth") <= 800, name


def test_an_interrupt_closes_it(tmp_path: Path) -> None:
    with served(tmp_path, signal.SIGINT, 0) as url:
        assert urlopen(url, timeout=60).status == 200  # else a shell that ignores interrupts has it ignore this one


def test_other_files_are_not_served(page: Any, address: str) -> None:
    for path in ("/etc/passwd", str(tiny.ROOT / "pyproject.toml"), "http://127.0.0.1:1/"):
        assert page.request.get(f"{address}/gradio_api/file={path}").status == 403
    assert page.request.get(address, headers={"Host": "evil.example"}).status == 403
