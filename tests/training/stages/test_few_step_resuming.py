"""A student's run that was stopped, killed or resumed ends with the bytes of one that was not, companions included."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import student_steps
import tiny
from stopped import same, stop_at
from student_steps import Case, Make, each_case, shake, weights
from whole_steps import everything, take

from training.models.assembly import load_pipeline
from training.models.lineage import stored_ingredients

make, teacher, installed = student_steps.make, student_steps.teacher, student_steps.installed
PROGRESSIVE = ["--config", "progressive", "--objective.from_steps", "4", "--objective.steps", "1",
               *tiny.SHORT, "--batch-size", "16"]
PROGRESSIVE += ["--lr", "0.01"]
HALF = 2  # a step before which a round of `progressive` ends, and the turn of a companion that learns


@each_case
def test_every_member_goes_on_bit_for_bit(case: Case, make: Make) -> None:
    """Networks, companions, averages, the moments of every optimiser: from a checkpoint on disk, in another stage."""
    _, straight, _ = make(case, home="straight")
    _, stopped, _ = make(case, home="stopped")
    for loop in (straight, stopped):
        shake(loop)
        for step in range(HALF):
            take(loop, step)
    stopped.save(HALF, wait=True)
    stage, resumed, _ = make(case, home="stopped")
    resumed.restore(resumed.checkpoints.load(resumed.checkpoints.find("latest")))  # type: ignore[arg-type]
    resumed.passes.open_data(HALF)
    for step in range(HALF, student_steps.STEPS):
        told = [take(loop, step) for loop in (straight, resumed)]
        assert {name: float(value) for name, value in told[0].items()} == {n: float(v) for n, v in told[1].items()}
    ours, theirs = everything(straight, student_steps.STEPS), everything(resumed, student_steps.STEPS)
    assert student_steps.different(ours[0], theirs[0]) == []
    assert {key: value for key, value in ours[1].items() if key != "journal"} == {
        key: value for key, value in theirs[1].items() if key != "journal"}
    learned = {key.split("/")[1] for key in ours[0] if key.startswith("optimizer/")}
    assert learned == set(resumed.optimizers) and all(weights(network) for network in stage.networks.values())


def train(teacher: Path, latents: Path, run: Path, *words: object) -> int:
    given = ("--teacher", teacher, "--latents", latents, "--output", run)
    return tiny.call("distill_denoiser", *given, *(words if "--resume" in words else (*PROGRESSIVE, *words)))


@pytest.fixture(scope="module")
def straight(teacher: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds of two steps, without interruption."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert train(teacher, latents, run) == 0
    tiny.keep()
    return run


def test_a_run_across_its_rounds(straight: Path, teacher: Path, latents: Path, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped where a round ends and within the next; it goes on by its own config."""
    run = tmp_path / "run"
    stop_at(monkeypatch, 2, 3)
    assert train(teacher, latents, run) == 128 + signal.SIGTERM
    again = ("--resume", "auto", "--device", "cpu")
    assert train(teacher, latents, run, *again) == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert "no --config was given: the run's own is used" in said and "resumed from step 2" in said
    assert train(teacher, latents, run, *again) == 0
    same(run, straight)
    for name in ("teacher.json", "ingredients.json"):
        assert (run / "final" / name).read_bytes() == (straight / "final" / name).read_bytes()


def test_what_a_run_says_of_its_teacher(straight: Path, teacher: Path) -> None:
    """Its name and hashes; the student's own are of its average, its text encoder and vocabulary the teacher's."""
    theirs, ours = (stored_ingredients(run / "final") for run in (teacher, straight))
    told = json.loads((straight / "final" / "teacher.json").read_text())
    hashes = {name: theirs[name] for name in ("denoiser", "text_encoder")}
    assert told == {"name": "teacher", "hashes": hashes}
    assert json.loads((straight / "run.json").read_text())["teacher"] == hashes
    assert ours.keys() == theirs.keys() and ours["denoiser"] != theirs["denoiser"]
    assert {name for name in ours if ours[name] != theirs[name]} == {"denoiser"}
    drawn = load_pipeline(straight, "cpu").hashes
    assert {name: drawn[name] for name in ours} == ours
    at_its_end = load_pipeline(straight / "checkpoints" / "step-00000006", "cpu").hashes
    assert at_its_end == drawn  # the average of the student, not a companion


def test_what_a_resume_refuses(straight: Path, teacher: Path, latents: Path, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Another teacher, none, other settings, another length of the rounds: each says what does go on."""
    run, other = tmp_path / "run", tmp_path / "other"
    stop_at(monkeypatch, 3)
    assert train(teacher, latents, run) == 128 + signal.SIGTERM
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    words = ("distill_denoiser", "--latents", latents, "--output", run, "--resume", "auto", "--device", "cpu")
    tiny.shake(shutil.copytree(teacher, other) / "final")
    problem = tiny.refused(*words, "--teacher", other)
    assert problem.code == 4 and problem.what.startswith("this run was made with teacher denoiser ")
    assert problem.hint == "give what the run began with, or begin another with --output"
    problem = tiny.refused(*words)
    assert problem.code == 2 and "none is named" in problem.what
    assert problem.hint == "give the trained denoiser with --teacher RUN, which was teacher"
    problem = tiny.refused(*words, "--teacher", teacher, "--optimizer.lr", "0.5")
    assert problem.code == 4 and "optimizer.lr: 0.01 -> 0.5" in problem.what and "--init-from" not in problem.hint
    problem = tiny.refused(*words, "--teacher", teacher, "--max-steps", "12")
    said = "at step 3 this run has come to the student of 2 steps, and of 12 steps it would be at the student of 4"
    assert said in problem.what and problem.hint.startswith("go on with --max-steps 6, ")
    assert tiny.refused("distill_denoiser", "--latents", latents, "--dry-run").hint.endswith("with --teacher RUN")
    after = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    assert {p: v for p, v in after.items() if p.name != "run.json"} == {
        p: v for p, v in before.items() if p.name != "run.json"}
    assert train(teacher, latents, run, "--resume", "auto", "--device", "cpu", "--max-steps", "5") == 0


def test_before_a_run(teacher: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--dry-run leaves nothing, --print-config tells all, with the network of the teacher."""
    assert train(teacher, latents, tmp_path / "run", "--dry-run") == 0
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    assert train(teacher, latents, tmp_path / "run", "--print-config") == 0
    told, theirs = json.loads(capsys.readouterr().out), json.loads((teacher / "final" / "config.json").read_text())
    assert told["objective"] == {"kind": "progressive", "from_steps": 4, "steps": 1}
    assert all(told[part] == theirs[part] for part in ("backbone", "text", "schedule", "prediction"))
    assert told["train"]["max_steps"] == 6 and told["format"] == theirs["format"]
    old = shutil.copytree(teacher / "final", tmp_path / "old")  # as an earlier version of the program wrote it
    (old / "config.json").write_text(json.dumps({**theirs, "format": {"version": 1}}))
    assert train(old, latents, tmp_path / "run", "--print-config") == 0
    assert json.loads(capsys.readouterr().out)["format"]["version"] == 1


def test_a_model_of_data_alone(latents: Path, tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    """By train_denoiser, with a text encoder that learns: stopped, resumed, told of, drawn with, and on a page."""
    words = ("--latents", latents, *tiny.DENOISER, "--objective.kind", "turns", "--lr", "0.01", "--batch-size", "16",
             "--max-steps", "4", "--train.log_every", "2", "--output")
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    assert tiny.call("train_denoiser", *words, run) == 0
    said = capsys.readouterr().err
    assert re.search(r"step 2/4  loss_fake \d+\.\d{4}  loss_student \d+\.\d{4}  lr ", said), said
    told = [sorted(name for name in row if name.startswith("loss_")) for row in tiny.rows(run) if "lr" in row]
    assert told == [["loss_student"], ["loss_fake"]] * 2
    assert "teacher" not in json.loads((run / "run.json").read_text())
    stop_at(monkeypatch, 3)
    assert tiny.call("train_denoiser", *words, stopped) == 128 + signal.SIGTERM
    assert tiny.call("train_denoiser", *words, stopped, "--resume", "auto") == 0
    same(stopped, run)
    page = (run / "report.html").read_text()
    assert "loss_fake" in page and "loss_student" in page
    ours, checkpoint = load_pipeline(run, "cpu"), run / "checkpoints" / "step-00000004"
    assert ours.hashes == load_pipeline(checkpoint, "cpu").hashes
    assert (run / "final" / "text_encoder" / "model.safetensors").read_bytes() == (
        stopped / "final" / "text_encoder" / "model.safetensors").read_bytes()
