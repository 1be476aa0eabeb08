"""The checkpoint writer killed at every point, on a full disk, and what pruning keeps."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from training import faults
from training.checkpoint import Checkpoint, Checkpoints
from training.errors import UserError
from training.verify_resume import launch

WRITER = """
import sys
from pathlib import Path
import torch
from training.checkpoint import Checkpoint, Checkpoints
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
        pytest.skip("mounting needs root")
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


def test_a_failing_removal_is_a_warning(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Checkpoints, path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Checkpoints, "_remove", refuse)
    kept.save(checkpoint(30))
    assert "warning: could not remove old checkpoint step-00000010" in capsys.readouterr().err
    assert kept.newest() == kept.folder / "step-00000030"
