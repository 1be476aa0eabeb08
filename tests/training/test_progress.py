"""How far a piece of work is: told on a terminal by one line that is written over, in a log by plain ones."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import tiny

from training import messages, progress
from training.messages import answer, duration, hush, tell, warn
from training.progress import Progress

Said = pytest.CaptureFixture[str]


class Terminal(io.StringIO):
    """What a terminal was sent, and what then stands on it."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Its lines, by the only two rules that any terminal has."""
        lines: list[str] = []
        for text in self.getvalue().split("\n"):
            line = ""
            for part in text.split("\r"):
                line = part + line[len(part) :]
            lines.append(line.rstrip())
        return lines


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A time that passes where a test says so."""
    now = SimpleNamespace(at=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.at))
    return now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    screen = Terminal()
    monkeypatch.setattr(messages, "sys", SimpleNamespace(stderr=screen, stdout=screen))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    return screen


def test_a_line_after_every_ten_seconds_in_a_log(clock: SimpleNamespace, capsys: Said) -> None:
    with Progress("packing", 100) as told:
        for _ in range(30):
            clock.at += 1
            told.add(2, "1 skipped")
    assert capsys.readouterr().err.splitlines() == [
        "packing: 20 of 100 pictures, 2.0 pictures/s, 40 s left, 1 skipped",
        "packing: 40 of 100 pictures, 2.0 pictures/s, 30 s left, 1 skipped",
        "packing: 60 of 100 pictures, 2.0 pictures/s, 20 s left, 1 skipped",
    ]


def test_short_work_says_nothing(clock: SimpleNamespace, capsys: Said) -> None:
    for _ in Progress("packing", 3).each([[1], [2], [3]]):
        clock.at += 3
    assert capsys.readouterr() == ("", "")


def test_what_was_there_before_counts_for_no_rate(clock: SimpleNamespace, capsys: Said) -> None:
    told = Progress("encoding", 100)
    told.skip(60)
    clock.at = 20
    told.add(10)
    assert capsys.readouterr().err == "encoding: 70 of 100 pictures, 2 s/picture, 1 min left\n"


def test_a_total_that_is_not_known(clock: SimpleNamespace, capsys: Said) -> None:
    told = Progress("counting captions", thing="caption")
    clock.at = 10
    told.add(50)
    assert capsys.readouterr().err == "counting captions: 50 captions, 5.0 captions/s\n"


def test_one_of_several_processes_tells(clock: SimpleNamespace, capsys: Said) -> None:
    told = Progress("encoding", 100, aloud=False)
    clock.at = 1e6
    told.add(50)
    assert capsys.readouterr().err == ""


def test_a_part_of_a_batch_counts_by_the_steps_of_its_sampler(clock: SimpleNamespace, capsys: Said) -> None:
    told = Progress("drawing", 8)
    told.at(4)
    watch = told.by_steps(4, steps=10)
    clock.at = 11
    watch(SimpleNamespace(step=4))
    assert capsys.readouterr().err == "drawing: 6 of 8 pictures, 1.83 s/picture, 4 s left\n"
    watch(SimpleNamespace(step=40))  # a sampler of more steps than were asked for
    assert told.done == 8


def test_a_terminal_shows_one_line_that_makes_way_for_messages(clock: SimpleNamespace, terminal: Terminal) -> None:
    with Progress("packing", 100) as told:
        for count in (10, 1):
            clock.at += 1
            told.add(count)
        assert terminal.screen() == ["packing: 11 of 100 pictures, 5.5 pictures/s, 16 s left"]
        warn("one is broken")
        assert terminal.screen() == ["warning: one is broken", ""]
        clock.at += 1
        told.add()
        assert terminal.screen()[-1] == "packing: 12 of 100 pictures, 4.0 pictures/s, 22 s left"
    assert terminal.screen() == ["warning: one is broken", ""]
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f]", terminal.getvalue())  # carriage returns alone


def test_a_line_wider_than_the_terminal_is_cut(clock: SimpleNamespace, terminal: Terminal) -> None:
    with Progress("a description that is much longer than any line has room for", 100) as told:
        clock.at = 1
        told.add()
        assert len(terminal.screen()[0]) == 59


def test_a_terminal_that_cannot_write_over_gets_plain_lines(
    clock: SimpleNamespace, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    told = Progress("packing", 100)
    clock.at = 10
    told.add()
    assert terminal.getvalue() == "packing: 1 of 100 pictures, 10 s/picture, 16 min 30 s left\n"


@pytest.mark.parametrize(("seconds", "said"), [
    (0.2, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3600, "1 h"), (3_660, "1 h 1 min"), (3_605, "1 h"),
    (90_000, "1 d 1 h"), (86_400 * 400, "400 d"),
])  # fmt: skip
def test_times_for_people(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_quiet_leaves_warnings_and_answers(clock: SimpleNamespace, capsys: Said) -> None:
    hush(True)
    try:
        told = Progress("packing", 100)
        clock.at = 1e6
        told.add()
        tell("told")
        messages.note("noted")
        warn("broken")
        answer("asked for")
    finally:
        hush(False)
    assert capsys.readouterr() == ("asked for\n", "warning: broken\n")


CODE = """
import time
from training.progress import Progress
with Progress("packing", 2) as told:
    for _ in range(2):
        time.sleep(0.25)
        told.add()
print("done")
"""


@pytest.mark.parametrize("on", ["terminal", "log"])
def test_a_real_terminal_and_a_real_log(on: str) -> None:
    ours, theirs = pty.openpty()
    streams: dict[str, int] = {"stdout": theirs, "stderr": theirs} if on == "terminal" else {
        "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}  # fmt: skip
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "PYTHONPATH": str(tiny.ROOT)}
    process = subprocess.Popen([sys.executable, "-c", CODE], env=environment, **streams)  # type: ignore[call-overload]
    said = process.communicate(timeout=60)[0] if on == "log" else b""
    process.wait(60)
    os.close(theirs)
    if on == "terminal":
        said = os.read(ours, 65536)
        assert b"\rpacking: 1 of 2 pictures" in said and b"\x1b" not in said and said.endswith(b"\rdone\r\n")
    else:
        assert said == b"done\n"
    os.close(ours)


DOORS: dict[str, Callable[..., list[object]]] = {
    "make_shards": lambda tmp, **_: ["pack", "shapes", "--samples", 8, "--output", tmp / "out"],
    "encode_latents": lambda tmp, autoencoder, shapes, **_: [
        "--autoencoder", autoencoder, "--data", shapes, "--output", tmp / "out", "--device", "cpu"],
    "train_denoiser": lambda tmp, latents, **_: [
        "--latents", latents, "--output", tmp / "out", *tiny.DENOISER, "--max-steps", 2, "--num-workers", 2],
    "generate": lambda tmp, denoiser, **_: [
        "--model", denoiser, "--prompt", "a red circle", "--output", tmp / "out", "--device", "cpu"],
    "evaluate": lambda tmp, denoiser, shapes, **_: [
        "--model", denoiser, "--output", f"{tmp}.json", "--data", shapes, "--steps", 1, "--device", "cpu"],
}  # fmt: skip
CHANGING = re.compile(r"^(seconds .*|.* MB, .* s \(.*)$", re.MULTILINE)


@pytest.mark.parametrize("door", DOORS)
def test_a_quiet_step_says_warnings_and_what_it_is_asked_for(
    door: str, request: pytest.FixtureRequest, tmp_path: object, capfd: Said
) -> None:
    """The file descriptors themselves are read: nothing of other processes or libraries comes through either."""
    names = ("shapes", "autoencoder", "latents", "denoiser")
    made = {name: request.getfixturevalue(name) for name in names}
    said = []
    for number, more in enumerate(([], ["--quiet"])):
        words = DOORS[door](tmp=tmp_path / str(number), **made)  # type: ignore[operator]
        capfd.readouterr()
        assert tiny.call(door, *words, *more) == 0
        said.append(capfd.readouterr())
    loud, quiet = said
    warnings = [line for line in loud.err.splitlines() if line.startswith("warning: ")]
    assert len(loud.err.splitlines()) > len(warnings) and quiet.err.splitlines() == warnings
    same = [CHANGING.sub("", text.replace("/1", "/0")) for text in (loud.out, quiet.out)]
    assert same[0] == same[1]
