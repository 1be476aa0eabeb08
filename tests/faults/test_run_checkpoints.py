"""The checkpoint writer killed at every point, on a full disk, and what pruning keeps."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from training.drills.verify_resume import launch
from training.errors import UserError
from training.loop.loop import Loop
from training.machine import faults
from training.runs.checkpoint import Checkpoint
from training.runs.checkpoint import score as score_of
from training.runs.checkpoints import Checkpoints
from training.runs.writer import Writer

WRITER = """
import sys
from pathlib import Path
import torch
from training.runs.checkpoint import Checkpoint
from training.runs.checkpoints import Checkpoints
weights = {"w": torch.full((4,), 30.0)}
checkpoint = Checkpoint(30, {"model": weights, "ema": weights, "optimizer": weights}, {})
Checkpoints(Path(sys.argv[1])).save(checkpoint)
"""
# point -> the newest sound checkpoint after a death there
DEATHS = {
    **dict.fromkeys(["checkpoint.staging", "checkpoint.manifest", "checkpoint.rename"], 20),
    **{f"checkpoint.file:{n}": 20 for n in (1, 2, 3, 4)},
    **dict.fromkeys(["checkpoint.latest", "checkpoint.prune"], 30),
}


@pytest.fixture(autouse=True)
def unvisited() -> Iterator[None]:
    faults.visits.clear()
    yield
    faults.visits.clear()


def checkpoint(step: int, **state: object) -> Checkpoint:
    weights = {"w": torch.full((4,), float(step))}
    return Checkpoint(step, {"model": weights, "ema": weights, "optimizer": weights}, state)


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    """A run with checkpoints of steps 10 and 20."""
    checkpoints = Checkpoints(tmp_path / "run")
    for step in (10, 20):
        checkpoints.save(checkpoint(step))
    return checkpoints


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir() if path.is_dir())


@pytest.mark.parametrize("point", DEATHS)
def test_killed_at(point: str, kept: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "writer.py").write_text(WRITER)
    run = str(kept.folder.parent)
    process = launch(tmp_path / "writer.py", [run], tmp_path / "log", {"LDM_FAULT": f"{point}=kill"})
    process.join(120)
    assert process.exitcode == -9, (tmp_path / "log").read_text()
    newest = kept.newest()
    assert newest is not None and newest.name == f"step-{DEATHS[point]:08d}"
    assert "warning" not in capsys.readouterr().err  # what is unfinished is not even taken for a checkpoint
    assert kept.load(newest).tensors["model"]["w"][0] == DEATHS[point]
    left = [name for name in names(kept) if name.startswith(".tmp-")]
    kept.sweep()
    assert not list(kept.folder.glob(".tmp-*"))
    assert all(f"note: removed unfinished checkpoint {name}" in capsys.readouterr().err for name in left[:1])
    kept.save(checkpoint(30))
    assert names(kept) == ["step-00000020", "step-00000030"]


@pytest.mark.parametrize("point", [p for p in DEATHS if p != "checkpoint.prune"])
def test_disk_full_at(point: str, kept: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_FAULT", f"{point}=enospc")
    with pytest.raises(UserError, match="No space left on device") as caught:
        kept.save(checkpoint(30))
    assert caught.value.code == 6 and not list(kept.folder.glob(".tmp-*"))
    newest = kept.newest()
    assert newest is not None and newest.name == f"step-{DEATHS[point]:08d}"
    assert kept.load(kept.folder / "step-00000020").step == 20


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A megabyte of disk holds two checkpoints of 300 kB, but not the third beside them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting needs root; the next test needs no rights")
    try:
        checkpoints, weights = Checkpoints(disk), {"w": torch.zeros(25_000)}
        for step in (1, 2):
            checkpoints.save(Checkpoint(step, dict.fromkeys(("model", "ema", "optimizer"), weights), {}))
        with pytest.raises(UserError, match="No space left on device") as caught:
            checkpoints.save(Checkpoint(3, {n: {"w": torch.zeros(50_000)} for n in ("model", "ema", "optimizer")}, {}))
        assert caught.value.code == 6 and names(checkpoints) == ["step-00000001", "step-00000002"]
        assert checkpoints.newest() == checkpoints.folder / "step-00000002"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from training.runs.checkpoint import Checkpoint
from training.runs.checkpoints import Checkpoints
from training.settings.flags import run_main
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
parts = {"model": 25_000, "ema": 60_000, "optimizer": 25_000}  # 240 kB of averages
checkpoint = Checkpoint(30, {name: {"w": torch.zeros(size)} for name, size in parts.items()}, {})
run_main(lambda: Checkpoints(Path(sys.argv[1])).save(checkpoint))
"""


def test_a_file_that_may_not_grow(kept: Checkpoints, tmp_path: Path) -> None:
    """The kernel itself refuses, whoever asks: no right of root's is needed, and none helps."""
    (tmp_path / "writer.py").write_text(LIMITED)
    process = launch(tmp_path / "writer.py", [str(kept.folder.parent)], tmp_path / "log", {})
    process.join(120)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 6 and "hint: free disk space" in said, said
    assert "ema.safetensors: File too large (" in said and " free)" in said  # wrapped in an error of safetensors' own
    assert "Traceback" not in said and names(kept) == ["step-00000010", "step-00000020"]
    assert kept.newest() == kept.folder / "step-00000020"


def test_a_fault_that_is_none(kept: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ("checkpoint.fil=kill", "checkpoint.file=explode", "checkpoint.file:x=kill", "checkpoint.file"):
        monkeypatch.setenv("LDM_FAULT", asked)
        with pytest.raises(UserError, match=r"expected <point>\[:n\]=<action>"):
            kept.save(checkpoint(30))


def test_pinned_and_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, keep_best=True)
    for step, score in [(10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 2.0), (60, float("nan"))]:
        checkpoints.save(checkpoint(step, **({"score": score} if score == score else {"score": None})))
        if step == 10:
            (checkpoints.folder / "step-00000010" / "pinned").touch()
    assert names(checkpoints) == [f"step-{step:08d}" for step in (10, 20, 50, 60)]
    plain = Checkpoints(tmp_path, 2)
    plain.save(checkpoint(70))
    assert names(plain) == [f"step-{step:08d}" for step in (10, 60, 70)]


def test_scores_of_two_rules_are_not_compared(tmp_path: Path) -> None:
    """A run that an earlier version began keeps the best of its scores, and the best of those measured since."""
    checkpoints = Checkpoints(tmp_path, 2, keep_best=True)
    for step, score, rule in [(10, 1.0, {}), (20, 9.0, {}), (30, 5.0, 2), (40, 6.0, 2), (50, 7.0, 2), (60, 8.0, 2)]:
        checkpoints.save(checkpoint(step, score=score, **({"scored_by": rule} if rule else {})))
    assert names(checkpoints) == [f"step-{step:08d}" for step in (10, 30, 50, 60)]
    assert score_of(checkpoints.folder / "step-00000010") is None
    assert score_of(checkpoints.folder / "step-00000030") == 5.0


def test_h3_what_a_link_names_is_never_deleted(
    kept: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pruning and sweeping pass over what lies outside the run's folder, named by a checkpoint or by a file of one."""
    outside = tmp_path / "outside"
    shutil.copytree(kept.folder / "step-00000010", outside)
    (kept.folder / "step-00000005").symlink_to(outside)
    (kept.folder / ".tmp-step-00000006-9").symlink_to(outside)
    (kept.folder / "step-00000010" / "more").symlink_to(outside)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    kept.sweep()
    kept.save(checkpoint(30))
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
    assert sorted(path.name for path in kept.folder.glob("step-*")) == [f"step-000000{n}" for n in (10, 20, 30)]
    told = capsys.readouterr().err  # the link in a checkpoint is none of the writer's files
    assert told.count("warning") == 1 and "step-00000010 is not removed" in told


def test_a_failing_removal_is_a_warning(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Checkpoints, path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Checkpoints, "_remove", refuse)
    kept.save(checkpoint(30))
    assert "warning: could not remove old checkpoint step-00000010" in capsys.readouterr().err
    assert kept.newest() == kept.folder / "step-00000030"


def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Saves wait, as on a slow disk, until the event is set."""
    go, kept = threading.Event(), Checkpoints.save

    def save(self: Checkpoints, taken: Checkpoint) -> Path:
        assert go.wait(60)
        return kept(self, taken)

    monkeypatch.setattr(Checkpoints, "save", save)
    return go


def test_a_background_save_writes_the_bytes_of_its_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, averages and state all change while the writer has not even begun."""
    calm, busy = Checkpoints(tmp_path / "calm"), Checkpoints(tmp_path / "busy")
    wide = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = {name: {"w": torch.arange(12.0).view(3, 4), "wide": wide} for name in ("model", "ema", "optimizer")}
    taken = Checkpoint(30, tensors, {"stage": {"seen": [1.0, 2.0]}})
    calm.save(taken)
    go, writer = held(monkeypatch), Writer(busy)
    writer.save(taken, wait=False)
    for part in tensors.values():
        part["w"].add_(1)
    wide.zero_()
    taken.state["stage"]["seen"][0] = 9.0
    assert not busy.folder.exists()
    go.set()
    writer.finish()
    for path in (calm.folder / "step-00000030").iterdir():
        assert (busy.folder / "step-00000030" / path.name).read_bytes() == path.read_bytes(), path.name
    assert (busy.folder / "latest").read_text() == "step-00000030\n"


def test_one_background_save_at_a_time(kept: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    go, writer = held(monkeypatch), Writer(kept)
    writer.save(checkpoint(30), wait=False)
    second = threading.Thread(target=writer.save, args=(checkpoint(40),), kwargs={"wait": False})
    second.start()
    second.join(0.2)
    assert second.is_alive() and len([t for t in threading.enumerate() if t.name == "checkpoint"]) == 1
    go.set()
    second.join()
    writer.save(checkpoint(50), wait=True)
    assert names(kept) == ["step-00000040", "step-00000050"] and writer.pending is None


@pytest.mark.parametrize("action", ["enospc", "raise"])
def test_a_failing_background_save_surfaces_later(
    action: str, kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_FAULT", f"checkpoint.file:2={action}")
    go, writer = held(monkeypatch), Writer(kept)
    writer.save(checkpoint(30), wait=False)
    writer.check()  # nothing has failed yet
    go.set()
    assert writer.pending is not None and writer.pending.exception(60) is not None
    with pytest.raises(UserError if action == "enospc" else RuntimeError) as caught:
        writer.check()
    assert not isinstance(caught.value, UserError) or caught.value.code == 6
    assert (kept.folder / "latest").read_text() == "step-00000020\n" and not list(kept.folder.glob(".tmp-*"))
    writer.check()  # told once
    writer.save(checkpoint(40), wait=True)
    assert kept.newest() == kept.folder / "step-00000040"


def test_weights_that_are_not_finite_are_refused_in_the_background_too(kept: Checkpoints) -> None:
    writer, bad = Writer(kept), checkpoint(30)
    bad.tensors["model"]["w"][1] = float("nan")
    writer.save(bad, wait=False)
    with pytest.raises(UserError, match="refusing to save: 1 tensors are not finite") as caught:
        writer.finish()
    assert caught.value.code == 5 and names(kept) == ["step-00000010", "step-00000020"]


ASYNC = ["--save-every", "2", "--train.log_every", "1", "--train.save_async", "true"]


def test_a_training_saves_in_the_background_with_the_same_bytes(latents: Path, tmp_path: Path) -> None:
    words = ["train_denoiser", "--latents", latents, *tiny.DENOISER, "--train.keep_last", "9"]
    assert tiny.call(*words, *ASYNC[:-1], "false", "--output", tmp_path / "calm") == 0
    assert tiny.call(*words, *ASYNC, "--output", tmp_path / "busy") == 0
    files = sorted(path.relative_to(tmp_path / "calm") for path in (tmp_path / "calm/checkpoints").rglob("*.*"))
    assert len([path for path in files if path.name == "manifest.json"]) == 3
    for path in files:
        assert (tmp_path / "busy" / path).read_bytes() == (tmp_path / "calm" / path).read_bytes(), path


def test_a_training_ends_at_the_step_after_a_failing_background_save(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, step = tmp_path / "run", Loop.step

    def slowly(self: Loop, number: int, rate: float) -> Any:
        if self.writer.pending:  # the step that the save is beside ends after it
            self.writer.pending.exception(60)
        return step(self, number, rate)

    monkeypatch.setattr(Loop, "step", slowly)
    monkeypatch.setenv("LDM_FAULT", "checkpoint.file:6=enospc")
    words = ["train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER, *ASYNC]
    problem = tiny.refused(*words)
    assert problem.code == 6 and "No space left on device" in problem.what
    assert Checkpoints(run).newest() == run / "checkpoints" / "step-00000002"
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], tiny.rows(run)[-1]["step"]) == ("failed", 5)  # step 5 was beside the save of step 4
    monkeypatch.delenv("LDM_FAULT")
    assert tiny.call(*words, "--resume", "auto") == 0


def test_a_writer_killed_in_the_background(latents: Path, tmp_path: Path) -> None:
    """kill -9 inside the background save ends the training; the checkpoint before it is what it goes on from."""
    run, script = tmp_path / "run", tiny.SCRIPTS / "train_denoiser.py"
    words = [str(w) for w in ("--latents", latents, "--output", run, *tiny.DENOISER, *ASYNC, "--resume", "auto")]
    process = launch(script, words, tmp_path / "log", {"LDM_FAULT": "checkpoint.rename:2=kill"})
    process.join(240)
    assert process.exitcode == -9, (tmp_path / "log").read_text()
    assert Checkpoints(run).newest() == run / "checkpoints" / "step-00000002"
    assert (run / "checkpoints" / "latest").read_text() == "step-00000002\n"
    assert tiny.call("train_denoiser", *words) == 0
    assert [row["step"] for row in tiny.rows(run) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_signal_waits_for_its_save(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("LDM_FAULT", "step:3=term")
    assert tiny.call("train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER, *ASYNC) == 143
    assert (run / "checkpoints" / "latest").read_text() == "step-00000003\n"
    assert not any(thread.name == "checkpoint" for thread in threading.enumerate())
