"""Signals in every situation: noted when they come, granted at the next step boundary."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from training.data.latents import Latents
from training.data.order import Slot
from training.drills.verify_resume import launch
from training.machine import faults
from training.machine.signals import Signals
from training.runs.checkpoints import Checkpoints

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def unvisited() -> Iterator[None]:
    faults.visits.clear()
    with tiny.heard(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        yield
    faults.visits.clear()


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
    assert f"stopped by SIGTERM: saved step {step}; resume with: " in said and "train_denoiser.py --latents" in said
    assert said.rstrip().endswith("--resume auto")
    assert Checkpoints(run).newest() == run / "checkpoints" / f"step-{step:08d}"
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["step"]) == ("stopped", step)
    assert not (run / "final" / "model.safetensors").exists()


def test_sigterm_in_loading(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, read = Latents.load, iter(range(100))

    def load(self: Latents, slots: list[Slot]) -> Any:
        if len(slots) == 32 and next(read) == 2:  # validation reads otherwise
            os.kill(os.getpid(), signal.SIGTERM)
        return kept(self, slots)

    monkeypatch.setattr(Latents, "load", load)
    assert tiny.call("train_denoiser", "--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER) == 143
    assert Checkpoints(tmp_path / "run").newest() == tmp_path / "run" / "checkpoints" / "step-00000003"


def test_usr1_in_a_save_is_one_more_save_after_it(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, words = tmp_path / "run", ("--save-every", "2", "--train.keep_last", "9")
    monkeypatch.setenv("LDM_FAULT", "checkpoint.file:2=usr1")
    assert tiny.call("train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER, *words) == 0
    assert [int(path.name[5:]) for path in sorted((run / "checkpoints").glob("step-*"))] == [2, 3, 4, 6]
    assert not list((run / "checkpoints").glob(".tmp-*"))


def test_ctrl_c_twice_in_a_save(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save is cut short: the checkpoint before it is whole, and nothing but a staging folder may remain of it."""
    run, words = tmp_path / "run", ("--save-every", "2", "--train.log_every", "1")
    kept, seen = faults.fault, iter(range(100))

    def twice(point: str) -> None:
        if point == "checkpoint.file" and next(seen) == 5:  # the second of the second save
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        kept(point)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("training.runs.checkpoints.fault", twice)
        tiny.call("train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER, *words)
    assert Checkpoints(run).newest() == run / "checkpoints" / "step-00000002"
    assert (run / "checkpoints" / "latest").read_text() == "step-00000002\n"
    left = {path.name for path in (run / "checkpoints").iterdir()} - {"latest", "step-00000002"}
    assert all(name.startswith(".tmp-") for name in left)
    gc.collect()  # frames that the exception holds keep the run's lock
    words = ("--latents", latents, "--output", run, *tiny.DENOISER, *words)
    assert tiny.call("train_denoiser", *words, "--resume", "auto") == 0
    assert [row["step"] for row in tiny.rows(run) if "loss" in row] == [1, 2, 3, 4, 5, 6]


OF_ITS_OWN = """
import os, runpy, sys
os.setsid()
script, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def test_signals_to_the_whole_group_spare_the_loaders(latents: Path, tmp_path: Path) -> None:
    """As torchrun, SLURM and a terminal's Ctrl-C send them: to loader processes, too."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["--latents", latents, "--output", run, *tiny.DENOISER, "--max-steps", "1000000", "--train.log_every", "1"]
    words += ["--sample-every", "1000000", "--save-every", "1000000", "--num-workers", "2"]
    (tmp_path / "group.py").write_text(OF_ITS_OWN)
    script = str(tiny.SCRIPTS / "train_denoiser.py")
    process = launch(tmp_path / "group.py", [script, *map(str, words)], log, {})
    assert process.pid
    wait_for(run, "timing.jsonl")
    for number, most in ((signal.SIGUSR1, 1), (signal.SIGTERM, 2)):
        os.killpg(process.pid, number)
        while len(list(run.glob("checkpoints/step-*"))) < most and process.is_alive():
            time.sleep(0.02)
    process.join(100)
    assert process.exitcode == 143, log.read_text()
    last = Checkpoints(run).newest()
    assert last and f"stopped by SIGTERM: saved step {int(last.name[5:])}" in log.read_text()
    assert "Traceback" not in log.read_text()


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
