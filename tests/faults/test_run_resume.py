"""What may change between a run and its resumption, what is said of it, and the two drills that users can repeat."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from training.drills.verify_resume import differences
from training.loop.loop import Loop
from training.machine import faults, processes
from training.runs.checkpoints import Checkpoints
from training.stages.denoiser import DenoiserStage

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def unvisited() -> Iterator[None]:
    faults.visits.clear()
    yield
    faults.visits.clear()


def stopped(monkeypatch: pytest.MonkeyPatch, step: int, *words: object) -> None:
    """Train until a SIGTERM in `step`."""
    faults.visits.clear()
    with monkeypatch.context() as patch:
        patch.setenv("LDM_FAULT", f"step:{step}=term")
        assert tiny.call(*words) == 143


def test_the_split_may_change_and_with_leave_the_batch(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER, "--train.log_every", "1"]
    stopped(monkeypatch, 2, *words)
    again = [*words, "--resume", "auto"]
    stopped(monkeypatch, 2, *again, "--micro-batch-size", "8")  # four passes a step, the same global batch
    assert "note: train.micro_batch_size: 0 -> 8" in capsys.readouterr().err
    problem = tiny.refused(*again, "--batch-size", "16")
    assert problem.code == 4 and "train.batch_size: 32 -> 16" in problem.what
    assert tiny.call(*again, "--batch-size", "16", "--allow-batch-change") == 0
    places = {p.name: Checkpoints(run).load(p).state["place"] for p in (run / "checkpoints").glob("step-*")}
    assert places == {"step-00000004": 4 * 32, "step-00000006": 4 * 32 + 2 * 16}  # no sample twice, none left out
    assert [row["step"] for row in tiny.rows(run) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_the_gradient_scaler_goes_on(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's fp16 scaler, put to work on a CPU: scale and growth counter of every step are those of one run."""
    kept = processes.start

    def scaled(*asked: Any, **flags: Any) -> Any:
        accelerator = kept(*asked, **flags)
        accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=2)
        return accelerator

    backward = DenoiserStage.backward

    def overflowing(self: DenoiserStage, batch: Any, step: int, share: float) -> Any:
        values = backward(self, batch, step, share)
        if step == 4:
            next(p for p in self.network.parameters() if p.grad is not None).grad.fill_(float("inf"))  # type: ignore[union-attr]
        return values

    monkeypatch.setattr(processes, "start", scaled)
    monkeypatch.setattr(DenoiserStage, "backward", overflowing)
    words = ["train_denoiser", "--latents", latents, *tiny.DENOISER, "--max-steps", "9", "--resume", "auto"]
    words += ["--train.log_every", "1", "--save-every", "1", "--train.keep_last", "9", "--output"]
    assert tiny.call(*words, tmp_path / "straight") == 0
    for step in (1, 4, 1):
        stopped(monkeypatch, step, *words, tmp_path / "broken")
    assert tiny.call(*words, tmp_path / "broken") == 0
    assert differences(tmp_path / "straight", tmp_path / "broken") == []
    told = []
    for run in ("straight", "broken"):
        checkpoints = Checkpoints(tmp_path / run)
        states = [checkpoints.load(path).state["scaler"] for path in sorted(checkpoints.folder.glob("step-*"))]
        told.append([(state["scale"], state["_growth_tracker"]) for state in states])
    assert told[0] == told[1] and len(told[0]) == 9
    moves = {after[0] / before[0] for before, after in pairwise(told[0])}
    assert moves == {0.5, 1.0, 2.0}, told  # an overflow, steps taken, and growth after two of these
    for run in ("straight", "broken"):
        (entry,) = json.loads((tmp_path / run / "run.json").read_text())["ledger"]["left out"].items()
        assert entry[0].startswith("steps skipped, their gradient an overflow of fp16") and entry[1]["count"] == 1


def test_a_resume_begins_with_the_books_of_its_checkpoint(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with those of a later stop, which a kill may have left in run.json."""
    run = tmp_path / "run"
    words = ["train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER]
    stopped(monkeypatch, 2, *words)
    record = json.loads((run / "run.json").read_text())
    sound = record["ledger"]
    assert sound["cut"]
    (run / "run.json").write_text(json.dumps({**record, "ledger": {"left out": {"stale": {"count": 9, "first": []}}}}))
    seen = []
    fit = Loop.fit

    def looked(self: Loop, start: int) -> int:
        seen.append(json.loads((run / "run.json").read_text()))
        return fit(self, start)

    monkeypatch.setattr(Loop, "fit", looked)
    assert tiny.call(*words, "--resume", "auto") == 0
    assert (seen[0]["status"], seen[0]["step"], seen[0]["ledger"]) == ("training", 2, sound)
    assert "stale" not in (run / "run.json").read_text()


@pytest.fixture
def kernels() -> Iterator[None]:
    """As the settings of the process were, afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def test_other_kernels_are_said_and_recorded_and_less_kept_is_not(
    kernels: None, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run begun before there were such keys, too, which had none of them on."""
    run = tmp_path / "run"
    words = ["train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER]
    stopped(monkeypatch, 2, *words)
    record = json.loads((run / "run.json").read_text())
    assert [record["environment"].pop(key) for key in ("tf32", "cudnn_benchmark")] == [False, False]
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.benchmark
    (run / "run.json").write_text(json.dumps(record))
    on = ["--train.tf32", "true", "--train.cudnn_benchmark", "true", "--backbone.gradient_checkpointing", "true"]
    assert tiny.call(*words, *on, "--resume", "auto") == 0
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.benchmark
    (entry,) = json.loads((run / "run.json").read_text())["resumes"]
    assert entry == {"step": 2, "changed": ["tf32 False -> True", "cudnn_benchmark False -> True"]}
    assert "bit-exactness is not guaranteed across tf32 False -> True" in capsys.readouterr().err


def test_other_software_is_said_and_recorded(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER]
    stopped(monkeypatch, 2, *words)
    record = json.loads((run / "run.json").read_text())
    record["versions"]["torch"], record["environment"]["device"] = "2.0.0", "cuda"
    (run / "run.json").write_text(json.dumps(record))
    stopped(monkeypatch, 1, *words, "--resume", "auto")
    said = capsys.readouterr().err
    assert "warning: bit-exactness is not guaranteed across torch 2.0.0 -> " in said and "device cuda -> cpu" in said
    assert tiny.call(*words, "--resume", "auto") == 0
    assert "bit-exactness" not in capsys.readouterr().err  # nothing changed since
    (entry,) = json.loads((run / "run.json").read_text())["resumes"]
    assert entry["step"] == 2 and len(entry["changed"]) == 2
    assert tiny.call(*words, "--resume", "auto") == 0
    assert "already complete at step 6" in capsys.readouterr().err


def test_a_future_given_up_is_not_gone_back_to(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed by name from step 2 and killed before the next save, a run goes on from 2, not from its old step 4."""
    run = tmp_path / "run"
    words = ["train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER, "--train.log_every", "1"]
    words += ["--save-every", "2"]
    stopped(monkeypatch, 4, *words)
    monkeypatch.setenv("LDM_FAULT", "step:2=raise")
    faults.visits.clear()
    with pytest.raises(RuntimeError, match="fault at step"):
        tiny.call(*words, "--resume", "step-00000002")
    monkeypatch.delenv("LDM_FAULT")
    assert Checkpoints(run).newest() == run / "checkpoints" / "step-00000002"
    assert tiny.call(*words, "--resume", "auto") == 0
    assert [row["step"] for row in tiny.rows(run) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_losses_that_never_begin_are_said(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("train_autoencoder", "--data", shapes, *tiny.AUTOENCODER, "--dry-run")
    assert tiny.call(*words, "--loss.adversarial_start", "6") == 0
    said = capsys.readouterr().err
    assert "warning: loss.adversarial_start 6 is not before train.max_steps 6" in said
    assert "discriminator_start" not in said


def test_verify_resume(latents: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    flags = [*tiny.DENOISER[2:], "--train.flip", "true"]
    words = ["--config", "smoke", "--latents", latents, "--steps", "5", *flags]
    assert tiny.call("verify_resume", *words) == 0
    said = capfd.readouterr().out
    assert "exact: 5 steps with 5 interruptions end with the bytes of 5 steps without" in said
    assert said.count("exit code 143") == 2 and said.count("exit code -9") == 3
    assert tiny.refused("verify_resume", "--config", "smoke").code == 2


def test_verify_resume_finds_what_is_not_exact(
    latents: Path, denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One character of the interrupted training's log is another. Finished runs stand for the trainings."""

    def trained(words: list[str], log: Path, *, fault: str = "") -> int:
        shutil.copytree(denoiser, Path(words[-1]), dirs_exist_ok=True, symlinks=True)
        if log.stem == "interrupted-5":
            with (tmp_path / "interrupted" / "metrics.jsonl").open("r+") as file:
                file.write("[")
        return 0

    monkeypatch.setattr("training.drills.verify_resume.run", trained)
    words = ["--latents", latents, "--folder", tmp_path, "--steps", "4", *tiny.DENOISER[2:]]
    problem = tiny.refused("verify_resume", *words)
    assert problem.code == 4 and problem.what == "the interrupted training differs in metrics.jsonl"


def test_verify_resume_of_a_student(latents: Path, denoiser: Path, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the training of distill_denoiser that is interrupted. Finished runs stand for the trainings."""
    started: list[list[str]] = []

    def trained(words: list[str], log: Path, *, fault: str = "") -> int:
        started.append(words)
        shutil.copytree(denoiser, Path(words[-1]), dirs_exist_ok=True, symlinks=True)
        return 0

    monkeypatch.setattr("training.drills.verify_resume.run", trained)
    words = ["--teacher", denoiser, "--config", "progressive", "--folder", tmp_path, "--steps", "4"]
    assert tiny.call("verify_resume", "--latents", latents, *words, "--batch-size", "8") == 0
    begins = ["distill_denoiser", "--teacher", str(denoiser), "--latents", str(latents), "--config", "progressive"]
    assert len(started) == 7 and all(words[:7] == begins and "--batch-size" in words for words in started)
    problem = tiny.refused("verify_resume", "--data", latents, *words)
    assert problem.code == 2 and "student" in problem.what


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_a_kill_at_a_random_moment(stage: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert tiny.call("soak", "--kills", 1, "--steps", "8", "--stage", stage, "--folder", tmp_path) == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"{stage}: 1 kills, \d+ trainings ended with the bytes of the uninterrupted one", last)


def test_killed_while_a_small_file_is_written(latents: Path, tmp_path: Path) -> None:
    """Its half is removed; a folder that holds only the config of this very run was begun by it, another's was not."""
    run = tmp_path / "run"
    words = ["train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER, "--resume", "auto"]
    assert tiny.call(*words, "--max-steps", "1") == 0
    halves = [run / ".run.json.99.partial", run / "final" / ".config.json.99.partial"]
    for half in halves:
        half.write_bytes(b"{")
    assert tiny.call(*words, "--max-steps", "2") == 0
    assert not list(run.rglob("*.partial"))

    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_bytes((run / "config.json").read_bytes())
    (begun / ".run.json.99.partial").write_bytes(b"{")
    assert tiny.call(*words[:4], begun, *words[5:], "--max-steps", "2") == 0
    assert (begun / "final" / "model.safetensors").is_file()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    assert "is not empty and holds no run" in tiny.refused(*words[:4], other, *words[5:]).what
    assert (other / "config.json").read_text() == "{}"
