"""Trainings that are stopped at a step, and whether two of them ended alike."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from training.loop.loop import Loop


def stop_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Every training after this is told to stop, as by SIGTERM, at the next of `steps`."""
    waiting: Iterator[int] = iter(steps)
    step, stopped, goal = Loop.step, Loop._poll_signals, [next(waiting)]

    def counted(self: Loop, number: int, rate: float) -> object:
        self.done = number + 1  # type: ignore[attr-defined]
        return step(self, number, rate)

    def asked(self: Loop) -> int:
        if self.done != goal[0]:  # type: ignore[attr-defined]
            return stopped(self)
        goal[0] = next(waiting, -1)
        return int(signal.SIGTERM)

    monkeypatch.setattr(Loop, "step", counted)
    monkeypatch.setattr(Loop, "_poll_signals", asked)


def same(run: Path, straight: Path) -> None:
    """Weights, averages, optimiser, plain state, metrics and export are equal byte for byte."""
    assert (run / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    ours, theirs = tiny.last_checkpoint(run), tiny.last_checkpoint(straight)
    assert ours.keys() == theirs.keys() and len(ours) == 5
    for name in ours:
        assert ours[name] == theirs[name], name
    for file in ("model.safetensors", "config.json"):
        assert (run / "final" / file).read_bytes() == (straight / "final" / file).read_bytes()
