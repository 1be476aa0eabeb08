"""What a few-step model is measured by, what it is not; and which samplers are compared on it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from few_step import Data, network

from autoencoder.norm import LatentNorm
from ldm.conditioning import Cond
from ldm.diffusion import Diffusion
from ldm.grids import Uniform
from ldm.guidance import ClassifierFree, Embedded
from ldm.jumps import SCALE, SPAN, Aim, Jumping, plainly
from ldm.pipeline import Pipeline, Sampling
from ldm.predictions import Velocity
from ldm.samplers import DPMpp2M, Heun, JumpSampler
from ldm.schedules import Flow
from ldm.students import Student
from training.errors import UserError
from training.measuring import conformance, sampler_agreement
from training.measuring.restoration import tell_limits


def measured(model: Path, *words: object) -> UserError | int:
    try:
        return tiny.call("evaluate", "--model", model, "--device", "cpu", "--count", 4, "--batch-size", 4, *words)
    except UserError as problem:
        return problem


MODES: dict[str, tuple[str, str]] = {  # of each measurement: its flags, and what is said; nothing where it is made
    "obedience": ("--obedience shapes", ""),
    "distances": ("--data DATA --count 12", ""),
    "guidance": ("--obedience shapes --guidance-scale 9", "scale"),
    "other steps": ("--obedience shapes --steps 5", "taught to draw in 1 step, not in 5"),
    "a plain sampler": ("--data DATA --count 12 --sampler ddim", "sampler ddim asks what a noisy sample"),
    "likelihood": ("--data DATA --likelihood 2", "--likelihood asks what a noisy sample may have been"),
    "classification": ("--data DATA --classify CAPTIONS --draws 2", "--classify asks what a noisy sample may have"),
    "restoration": ("--data DATA --restore box --samples 2", "pigdm asks what a noisy sample may have been"),
    "a posterior": ("--data DATA --restore box --method ddrm --samples 2", "ddrm asks what a noisy sample"),
    "edits": ("--edits shapes", "--edits shapes draws with ddpm and ddim too"),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ["baked", "told"])
def test_a_student_is_measured_by_what_it_draws(
    mode: str, model: str, taught: Path, shapes: Path, tmp_path: Path
) -> None:
    flags, said = MODES[mode]
    (tmp_path / "captions.txt").write_text("a red circle\na blue square\n")
    meant = {"DATA": shapes, "CAPTIONS": tmp_path / "captions.txt"}
    found = measured(taught / model, *(meant.get(word, word) for word in flags.split()))
    assert found == 0 if not said else isinstance(found, UserError) and said in found.what and found.hint, found


def test_what_a_student_is_not_measured_by_its_teacher_is(taught: Path, shapes: Path, tmp_path: Path) -> None:
    """As the hints say."""
    (tmp_path / "captions.txt").write_text("a red circle\na blue square\n")
    for words in (("--likelihood", 2, "--steps", 2), ("--classify", tmp_path / "captions.txt", "--draws", 1)):
        problem = measured(taught / "baked", "--data", shapes, *words)
        assert isinstance(problem, UserError) and problem.hint == "measure a run that train_denoiser has trained"
        others = measured(taught / "teacher", "--data", shapes, *words)
        assert others == 0 or (isinstance(others, UserError) and "no held-out picture has" in others.what)
    words = ("--samplers", "midpoint", "--steps", 200)
    assert "--model TEACHER" in tiny.refused("check_samplers", "--model", taught / "told", *words).hint
    assert tiny.call("check_samplers", "--model", taught / "teacher", *words) == 0


def test_a_range_of_scales_is_measured_at_any(taught: Path, tmp_path: Path) -> None:
    """The numbers say at which."""
    for scale in (1, 8):
        where = ("--obedience", "shapes", "--guidance-scale", scale, "--output", tmp_path / f"{scale}.json")
        assert measured(taught / "told", *where) == 0
        numbers = json.loads((tmp_path / f"{scale}.json").read_text())
        assert numbers["settings"]["guidance"] == {"kind": "embedded", "scale": scale}


def test_guidance_that_is_baked_in_is_told_of_where_spread_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Sampling(sampler=JumpSampler(), grid=Uniform(), guidance=ClassifierFree(scale=1.0), steps=1)
    tell_limits(19, plan, Student(guidance_scale=3.0))
    assert "guidance of scale 3 is baked into this student" in capsys.readouterr().err
    tell_limits(19, plan)
    assert not capsys.readouterr().err


# Samplers


def test_samplers_of_few_step_models_are_left_out_of_exact_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.call("check_samplers", "--samplers", "heun", "--processes", "flow", "--steps", 4) == 0
    assert "Left out: jump, consistency,\nwhich take the steps of few-step models." in capsys.readouterr().out
    assert set(conformance.every("sampler")) - set(conformance.denoising("all")) == {"jump", "consistency"}
    problem = tiny.refused("check_samplers", "--samplers", "heun,consistency", "--processes", "flow")
    assert "consistency takes the steps of a few-step model" in problem.what and "leave it out" in problem.hint


def test_samplers_of_few_step_models_are_none_of_a_run(denoiser: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", denoiser, "--seeds", 16, "--steps", 2)
    problem = tiny.refused("check_samplers", *words, "--samplers", "heun,jump")
    assert "jump takes the steps of a few-step model" in problem.what and problem.hint == "leave it out of --samplers"
    assert tiny.call("check_samplers", *words) == 0  # of a network that answers nothing yet
    said = capsys.readouterr().out
    assert "Left out: jump, consistency, which are not of this kind of model." in said and "| dpmpp-2m |" in said


@pytest.mark.parametrize("model", ["baked", "told"])
def test_a_student_that_is_no_denoiser_has_no_samplers_to_compare(model: str, taught: Path) -> None:
    problem = tiny.refused("check_samplers", "--model", taught / model, "--steps", 2)
    assert "a comparison of samplers asks what a noisy sample may have been" in problem.what
    assert "--model TEACHER" in problem.hint


def exact_student(aim: Aim, told: list[float] | None = None) -> Pipeline:
    """A few-step model of latents N(0.3, 0.5^2), exact in its jumps and as a denoiser."""

    class Sized:
        factor, latent_channels, norm = 1, 3, LatentNorm(3)

    config: Any = SimpleNamespace(reads=(SPAN,), reading=plainly)
    exact, diffusion = network(config, Data(Flow(), 0.5, 0.3)), Diffusion(schedule=Flow(), prediction=Velocity())

    def heard(x: torch.Tensor, level: torch.Tensor, cond: Cond) -> torch.Tensor:
        if told is not None:
            told.extend(cond.extras[SCALE].tolist())
        return exact(x, level, cond)

    guidance = ClassifierFree(scale=1.0) if told is None else Embedded(scale=3.0)
    student = Student(steps=(1, 4), guidance_scale=() if told is None else (1.0, 8.0))
    plan = Sampling(sampler=JumpSampler(), grid=Uniform(), guidance=guidance, steps=4)
    cond = Cond(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
    denoiser = Jumping(heard, diffusion, plainly, True, aim)
    return Pipeline(Sized(), denoiser, lambda captions: cond.expand(len(captions)), plan, (6, 6),  # type: ignore[arg-type]
                    student=student)


@pytest.mark.parametrize("kind", ["jump", "consistency", "heun", "ddpm"])
def test_jumps_have_the_law_of_the_exact_student(kind: str) -> None:
    """In more steps than it was taught, which is what samplers are compared by."""
    bench = sampler_agreement.Bench(exact_student("any"), "", 60, 32)
    sampler = conformance.every("sampler")[kind]
    bench.check(sampler)
    row = bench.judge(sampler)
    assert row.agrees and row.stochastic == (kind != "heun"), row


def test_a_scale_that_is_told_is_told_there_too() -> None:
    told: list[float] = []
    bench = sampler_agreement.Bench(exact_student("any", told), "", 40, 16)
    assert bench.judge(Heun()).agrees and set(told) == {3.0}


def test_which_samplers_are_of_which_model() -> None:
    bench = sampler_agreement.Bench(exact_student("none"), "", 20, 16)
    for sampler in (DPMpp2M(), JumpSampler()):
        bench.check(sampler)
    with pytest.raises(ValueError, match="give --sampler jump"):
        bench.check(conformance.every("sampler")["consistency"])
