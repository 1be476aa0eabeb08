"""Signals in every situation: noted when they come, granted at the next step boundary."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from training import faults
from training.checkpoint import Checkpoints
from training.signals import Signals
from training.verify_resume import launch

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def unvisited() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    faults.visits.clear()
    yield
    faults.visits.clear()
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("fault", "step"),
    [("step:3=term", 3), ("checkpoint.file:2=term", 3), ("samples:2=term", 4), ("metrics:7=term", 3)],
    ids=["in a step", "in a save", "in sampling", "in writing"],
)
def test_sigterm(
    fault: str, step: int, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, words = tmp_path / "run", ("--save-every", "2", "--train.log_every", "1")
    monkeypatch.setenv("LDM_FAULT", fault)
    assert tiny.call("train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER, *words) == 143
    said = capsys.readouterr().err
    assert f"stopped by SIGTERM: saved step {step}; resume with: train_denoiser --latents" in said
    assert said.rstrip().endswith("--resume auto")
    assert Checkpoints(run).newest() == run / "checkpoints" / f"step-{step:08d}"
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["step"]) == ("stopped", step)
    assert not (run / "final" / "model.safetensors").exists()


def wait_for(path: Path, pattern: str) -> Path:
    deadline = time.monotonic() + 200
    while not (found := list(path.glob(pattern))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found[0]


def test_usr1_saves_and_goes_on_then_ctrl_c_stops(latents: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["--latents", latents, "--output", run, *tiny.DENOISER, "--max-steps", "1000000", "--train.log_every", "1"]
    words += ["--sample-every", "1000000", "--save-every", "1000000"]
    process = launch(tiny.SCRIPTS / "train_denoiser.py", [str(word) for word in words], log, {})
    assert process.pid
    wait_for(run, "timing.jsonl")
    os.kill(process.pid, signal.SIGUSR1)
    first = wait_for(run, "checkpoints/step-*")
    os.kill(process.pid, signal.SIGINT)
    process.join(100)
    assert process.exitcode == 130, log.read_text()
    last = Checkpoints(run).newest()
    assert last and last.name > first.name and f"stopped by SIGINT: saved step {int(last.name[5:])}" in log.read_text()
    assert len(tiny.rows(run)) == int(last.name[5:]) + 1  # and the first look


def test_a_second_ctrl_c_leaves_at_once() -> None:
    signals = Signals()
    signals.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.take_save() and not signals.take_save() and not signals.stop
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.stop == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    signals.stop = 0
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)  # however often: the save is not cut short
    assert signals.stop == signal.SIGTERM
