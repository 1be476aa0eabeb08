"""Disks that are full, folders that cannot be written to or are taken, and logs that fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from training.machine import faults
from training.runs.checkpoints import Checkpoints
from training.runs.folder import Run
from training.settings.decoding import load
from training.stages.autoencoder_job import AutoencoderJob

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def unvisited() -> Iterator[None]:
    faults.visits.clear()
    yield
    faults.visits.clear()


@pytest.mark.parametrize(
    ("fault", "newest"),
    [("metrics:3", None), ("metrics:6", 2), ("samples:2", 2), ("checkpoint.file:3", None), ("checkpoint.file:7", 2),
     ("export", 6)],
)  # fmt: skip
def test_full_while_training(
    fault: str, newest: int | None, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was being written, the checkpoints before it are whole and the training goes on from them."""
    run = tmp_path / "run"
    words = ["--latents", latents, "--output", run, *tiny.DENOISER, "--save-every", "2", "--train.log_every", "1"]
    with monkeypatch.context() as patch:
        patch.setenv("LDM_FAULT", f"{fault}=enospc")
        problem = tiny.refused("train_denoiser", *words)
    assert problem.code == 6 and "No space left" in problem.what and "free disk space" in problem.hint
    found = Checkpoints(run).newest()
    assert found == (newest and run / "checkpoints" / f"step-{newest:08d}")
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    assert tiny.call("train_denoiser", *words, "--resume", "auto") == 0
    assert [row["step"] for row in tiny.rows(run) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_too_little_room_is_told_before_the_first_step(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = tmp_path / "run", shutil.disk_usage(tmp_path)
    words = ("--latents", latents, "--output", run, *tiny.DENOISER)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=200_000))
    problem = tiny.refused("train_denoiser", *words)
    assert problem.code == 6 and "needs " in problem.what and "0.2 MB free" in problem.what
    assert not (run / "metrics.jsonl").exists() and not (run / "samples").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda _: whole)
    assert tiny.call("train_denoiser", *words, "--resume", "auto") == 0
    size = sum(path.stat().st_size for path in (run / "checkpoints").glob("step-00000006/*.safetensors"))
    told = float(problem.what.partition("needs ")[2].split(" MB")[0]) * 1e6
    assert told == pytest.approx(3 * size, rel=0.2)  # two and the one being written; headers apart


def test_a_folder_that_cannot_be(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoencoderJob, "build", lambda *_: pytest.fail("a model was built"))
    (tmp_path / "file").touch()
    for output in ("/proc/run", tmp_path / "file", tmp_path / "file" / "run"):
        problem = tiny.refused("train_autoencoder", "--data", shapes, "--output", output, *tiny.AUTOENCODER)
        assert problem.code == 6 and str(output) in problem.what and "another --output" in problem.hint


def test_who_holds_a_run(tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "run", "autoencoder", load("autoencoder", "smoke"), None)
    words = ("--data", shapes, "--output", run.folder, *tiny.AUTOENCODER)
    problem = tiny.refused("train_autoencoder", *words)
    assert problem.code == 4 and f"{run.folder} is in use by pid {os.getpid()} since " in problem.what
    run.lock.close()  # as a death would, with the owner's name left
    Run(run.folder, "autoencoder", load("autoencoder", "smoke"), None).leave()
    assert f"was left by pid {os.getpid()} since " in capsys.readouterr().err
    Run(run.folder, "autoencoder", load("autoencoder", "smoke"), None).leave()
    assert "was left" not in capsys.readouterr().err
