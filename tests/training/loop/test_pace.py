"""How fast a run goes, and when it ends: told once, after ten steps, the first of which does not count."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training.loop import pace
from training.loop.pace import Pace, outlook

CPU: Any = SimpleNamespace(device=torch.device("cpu"), is_main_process=True)


def run(patch: pytest.MonkeyPatch, seconds: list[float], start: int, max_steps: int) -> None:
    """Steps that take so long, by a clock of the test."""
    clock = [100.0]
    patch.setattr(pace.time, "perf_counter", lambda: clock[0])
    watch = Pace(CPU, start, max_steps)
    for number, each in enumerate(seconds, start + 1):
        watch.begin()
        clock[0] += each
        watch.end(number)
        clock[0] += 1000  # validation, say


def test_told_once_by_the_median(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, [50.0, *[0.25] * 5, *[9.0] * 4, *[0.25] * 90], 0, 100)
    said = capsys.readouterr().err
    assert said.count("pace: ") == 1 and "pace: 4.0 steps/s; the other 90 take 22 s, until about " in said


def test_told_again_where_a_run_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, [2.0] * 20, 500, 4100)
    assert "pace: 2 s/step; the other 3,590 take 2.0 h, until about " in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "max_steps"), [(9, 9), (10, 10)])
def test_a_short_run_says_nothing(
    steps: int, max_steps: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, [1.0] * steps, 0, max_steps)
    assert capsys.readouterr().err == ""


def test_the_hour_and_another_day() -> None:
    noon = time.mktime((2026, 3, 1, 12, 0, 0, 0, 0, -1))
    assert outlook(0.5, 7200, noon) == (
        "pace: 2.0 steps/s; the other 7,200 take 60 min, until about 13:00, besides validation and pictures"
    )
    assert "take 20.0 h, until about 2026-03-02 08:00" in outlook(1, 72_000, noon)
