"""What no student can be taught, of which teacher; and where a student is not what a door asks for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import students
import tiny
from packs import write

from training.errors import UserError
from training.stages.student_job import StudentJob


def refused(taught: Path, latents: Path, *words: object, teacher: str = "teacher") -> UserError:
    where = ("--teacher", taught / teacher, "--latents", latents, *students.SHORT, "--dry-run")
    return tiny.refused("distill_denoiser", *where, *words)


def changed(run: Path, to: Path, **sections: dict[str, Any]) -> Path:
    """A copy of a run whose config says something else."""
    shutil.copytree(run, to)
    for path in (to / "config.json", to / "final" / "config.json"):
        values = json.loads(path.read_text())
        for name, section in sections.items():
            values[name] = section if "kind" in section else values[name] | section
        write(path.parent, {path.name: json.dumps(values)})
    return to


WRONG: dict[str, tuple[str, str, str]] = {  # of each: the flags, and what is said
    "two scales that fall": ("--student.guidance_scale 8,1", "one number above 0, or two that rise", "--print-config"),
    "no scale": ("--student.guidance_scale 0", "one number above 0", "--print-config"),
    "scales that are words": ("--student.guidance_scale x", "expected a number", "--help"),
    "a teacher of no use": ("--student.learns_from data", "progressive learns from a teacher alone", "leave it out"),
    "noise that is paired": ("--pairing.kind minibatch-ot", "taught with independent noise", "leave it out"),
    "prior pictures": ("--prior.weight 1", "prior pictures are drawn by the base of an adapter", "leave it out"),
    "another network": ("--backbone.width 32", "begins as its teacher is, but the config would", "another shape"),
    "another process": ("--schedule.kind vp", "schedule.kind: flow -> vp", "leave these keys out"),
    "an adapter": ("--adapter.kind lora", "adapter.kind: none -> lora", "leave these keys out"),
    "an image": ("--image.kind masked", "image.kind: none -> masked", "leave these keys out"),
    "other weights": ("--init-from {teacher}", "--init-from and --new-words change what a student", "leave them out"),
    "a plain sampler": ("--sampler.kind dpmpp-2m", "dpmpp-2m asks what a noisy sample may have been", "the config"),
    "guidance of its drawings": ("--guidance.scale 5", "the guidance of a student is what it", "give --student.guid"),
    "other steps": ("--sample.steps 5", "sample.steps 5: it is taught to draw in 1 step", "--objective.steps N"),
    "guidance by a picture": ("--sample.image_scale 1.5", "sample.image_scale", "--sample.image_scale 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_no_student_is_taught(case: str, taught: Path, latents: Path) -> None:
    flags, said, hint = WRONG[case]
    problem = refused(taught, latents, *flags.format(teacher=taught / "teacher").split())
    assert said in problem.what and hint in problem.hint


def test_a_config_of_no_student(taught: Path, latents: Path, tmp_path: Path) -> None:
    (path := tmp_path / "without.toml").write_text('[sampler]\nkind = "jump"\n')
    words = ("--teacher", taught / "teacher", "--latents", latents, "--dry-run")
    problem = tiny.refused("distill_denoiser", *words, "--config", path)
    assert "no [objective] that teaches a student" in problem.what and "progressive" in problem.hint
    for name in ("lora", "smoke"):
        assert f"no config named '{name}'" in tiny.refused("distill_denoiser", *words, "--config", name).what
    assert students.distill(taught / "teacher", latents, "--dry-run") == 0
    problem = tiny.refused("distill_denoiser", *words)
    assert "nothing is proposed for one" in problem.what and "progressive" in problem.hint


def test_a_teacher_must_be_one(taught: Path, latents: Path, autoencoder: Path, tmp_path: Path) -> None:
    assert "is a run of the autoencoder stage" in refused(taught, latents, "--teacher", autoencoder).what
    assert "no such run" in refused(taught, latents, "--teacher", tmp_path / "nowhere").what
    words = ("--base", taught / "teacher", "--latents", latents, "--config", "lora", *tiny.SHORT, "--max-steps", 1)
    assert tiny.call("train_denoiser", *words, "--output", tmp_path / "lora") == 0
    problem = refused(taught, latents, "--teacher", tmp_path / "lora")
    assert "is an adapter upon teacher, not a whole model" in problem.what and "--teacher" in problem.hint
    whole = ("--adapter", tmp_path / "lora", "--output", tmp_path / "whole", "--dtype", "float32")
    assert tiny.call("export_model", taught / "teacher", *whole) == 0
    assert students.distill(tmp_path / "whole", latents, "--dry-run") == 0


def test_latents_must_be_those_of_the_teacher(taught: Path, latents: Path, grey: Path) -> None:
    problem = refused(taught, grey / "latents")
    assert problem.code in (3, 4) and problem.hint
    problem = refused(taught, latents, "--teacher", "demo")
    assert problem.code == 4 and "the teacher demo draws with autoencoder" in problem.what
    assert "--autoencoder TEACHER/final/autoencoder" in problem.hint


@pytest.mark.parametrize("kind", ["apg", "cfg-zero-star", "autoguidance", "classifier"])
def test_guidance_that_no_student_takes_in(kind: str, taught: Path, latents: Path, tmp_path: Path) -> None:
    """Unless a scale of classifier-free guidance is asked for in its place; then it is drawn without its teacher's."""
    teacher = changed(taught / "teacher", tmp_path / "teacher", guidance={"kind": kind})
    problem = refused(taught, latents, "--teacher", teacher)
    assert f"the teacher draws with guidance {kind}" in problem.what
    assert "--student.guidance_scale W, 1 for none" in problem.hint
    for scale, baked in ((1, None), (3, 3.0)):
        run = tmp_path / str(scale)
        assert students.distill(teacher, latents, "--student.guidance_scale", scale, "--output", run) == 0
        values = json.loads((run / "config.json").read_text())
        assert values["guidance"]["kind"] == "classifier-free" and values["guidance"]["scale"] == 1
        assert values["student"]["guidance_scale"] == [scale]
        card = (run / "final" / "README.md").read_text()
        assert ("No guidance was taken in." if baked is None else "Guidance at scale 3 is baked in") in card
        words = ("--model", run, "--prompt", "red", "--output", run / "pictures", "--device", "cpu")
        assert tiny.call("generate", *words) == 0


def test_a_student_is_no_denoiser_to_learn_from(taught: Path, latents: Path) -> None:
    for teacher in ("baked", "told"):
        problem = refused(taught, latents, teacher=teacher)
        assert "is a few-step model (objective.kind progressive), which is no denoiser" in problem.what
        assert problem.hint == "give the model that taught it with --teacher"


def test_a_student_of_half_the_steps(taught: Path, latents: Path, tmp_path: Path) -> None:
    """Its own guidance stays, baked or told, and neither twice nor out of its range."""
    for name, scale in (("baked", [2.0]), ("told", [1.0, 8.0])):
        given = ["--objective.from_steps", 4, "--objective.steps", 2]
        given += [] if name == "baked" else ["--student.guidance_scale", "1,8"]
        first, second = tmp_path / name / "first", tmp_path / name / "second"
        students.student(taught / "teacher", latents, first, *given)
        hint = refused(taught, latents, "--teacher", first).hint
        once = ["--objective.from_steps", "1", "--objective.steps", "1"]
        assert hint.endswith(f", or go on with it: {' '.join(once)}")
        students.student(first, latents, second, *once)
        values = json.loads((second / "config.json").read_text())
        assert values["student"] == {"steps": [1], "guidance_scale": scale, "learns_from": "teacher"}
        assert json.loads((second / "final" / "teacher.json").read_text())["name"] == "first"
    baked, told = (tmp_path / name / "first" for name in ("baked", "told"))
    again = (*once, "--student.guidance_scale")
    assert students.distill(baked, latents, *once, "--dry-run") == 0
    problem = refused(taught, latents, "--teacher", baked, *again, 3)
    assert "guidance at scale 2 is baked into the teacher" in problem.what and "leave --student.gui" in problem.hint
    problem = refused(taught, latents, "--teacher", told, *again, "1,9")
    assert "was taught guidance scales from 1 to 8" in problem.what and "1,8, or a range within it" in problem.hint
    problem = refused(taught, latents, "--teacher", told, *again, 3)
    assert "would not begin as it is" in problem.what and "--student.guidance_scale 1,8" in problem.hint
    assert students.distill(told, latents, *again, "2,4", "--dry-run") == 0


def test_a_teacher_without_guidance_in_it_is_guided(
    taught: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale of 1 is none: its student may take another in. One that has its own is asked as it is."""
    asked = list[Any]()
    load = StudentJob.load_teacher
    monkeypatch.setattr(StudentJob, "load_teacher", lambda *args: asked.append(load(*args)) or asked[-1])
    for scale in (1, 2):
        first = tmp_path / str(scale)
        steps = ("--objective.from_steps", 2, "--objective.steps", 2, "--student.guidance_scale", scale)
        students.student(taught / "teacher", latents, first, *steps)
        again = 3 if scale == 1 else 2
        how = ("--objective.from_steps", 1, "--student.guidance_scale", again, "--dry-run")
        assert students.distill(first, latents, *how) == 0
    assert [teacher.guidance.scale for teacher in asked] == [1, 3, 2, 1]
    assert [teacher.null is None for teacher in asked] == [False, False, False, True]


def test_a_learned_variance_is_of_no_use(taught: Path, latents: Path, tmp_path: Path) -> None:
    words = ("--latents", latents, *tiny.DENOISER, "--max-steps", 1, "--backbone.learned_variance", "true")
    process = ("--schedule.kind", "ddpm-scaled-linear", "--prediction.kind", "eps", "--grid.kind", "trailing")
    assert tiny.call("train_denoiser", *words, *process, "--sampler.kind", "ddim", "--output", tmp_path / "run") == 0
    problem = refused(taught, latents, "--teacher", tmp_path / "run")
    assert "no use for a learned variance: take a model without it" in problem.what
    assert "--print-config" in problem.hint and students.distill(tmp_path / "run", latents, "--print-config") == 0


def test_a_run_goes_on_with_its_own_teacher_alone(taught: Path, latents: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", shutil.copytree(taught / "teacher", tmp_path / "other")
    assert students.distill(taught / "teacher", latents, "--output", run) == 0
    tiny.shake(Path(other) / "final")
    problem = tiny.refused("distill_denoiser", "--teacher", other, "--latents", latents, *students.SHORT,
                           "--max-steps", 4, "--output", run, "--resume", "auto")  # fmt: skip
    assert problem.code == 4 and "teacher" in problem.what


TRAINED: dict[str, tuple[str, str, str]] = {
    "a student's config": ("--config progressive", "is learned from a trained model", "distill_denoiser --teacher RUN"),
    "its objective": ("{D} --objective.kind progressive", "objective.kind progressive is learned from", "distill"),
    "a run's config": ("--config {baked}/config.json", "objective.kind progressive is learned from a", "distill_den"),
    "a scale": ("{D} --student.guidance_scale 3", "student.guidance_scale says how a few-step", "leave it out, or"),
    "a range": ("{D} --student.guidance_scale 1,8", "student.guidance_scale says how", "distill_denoiser --teacher"),
    "steps": ("{D} --student.steps [4]", "student.steps says how a few-step model was taught", "leave it out, or"),
    "an adapter": ("--base {baked} --config lora", "the base is a few-step model (objective.kind prog", "the teacher"),
    "a control": ("--base {told} --config controlnet", "the base is a few-step model", "export_model"),
    "told weights": ("{D} --init-from {told}", "is told its guidance_scale, and this one is told none", "taught it"),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAINED)
def test_what_train_denoiser_leaves_to_students(case: str, taught: Path, latents: Path) -> None:
    flags, said, hint = TRAINED[case]
    words = flags.format(D=" ".join(tiny.DENOISER), baked=taught / "baked", told=taught / "told").split()
    where = ("--latents", latents, "--device", "cpu", "--batch-size", 8, "--dry-run")
    problem = tiny.refused("train_denoiser", *words, *where)
    assert said in problem.what and hint in problem.hint


def test_weights_of_a_student_may_begin_a_denoiser(
    taught: Path, latents: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--latents", latents, *tiny.DENOISER, "--init-from", taught / "baked", "--max-steps", 1)
    assert tiny.call("train_denoiser", *words, "--student.learns_from", "data", "--output", tmp_path / "run") == 0
    assert "student.learns_from: objective.kind is denoising" in capsys.readouterr().err
