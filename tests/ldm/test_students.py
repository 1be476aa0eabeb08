"""Few-step models among all that a drawing may be asked: what keeps their jumps is exact, and all else is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from few_step import Data, flow_process, network
from looping import each
from torch import Tensor

from autoencoder.identity import Identity
from ldm.arguments import translated
from ldm.conditioning import Cond
from ldm.denoiser import Bound, Denoise, Denoiser
from ldm.editing import Known, Windows
from ldm.exact import F64, Counted, Isotropic, marginal, scalar, two_modes
from ldm.grids import Given, Karras, Uniform
from ldm.guidance import Autoguidance, ByClassifier, ClassifierFree, Embedded
from ldm.image_tasks import edit_friendly_inversion, image_to_image, inpainting, inverted, restoration
from ldm.inverse.measurement import DDNM
from ldm.inverse.operators import Box
from ldm.inverse.posterior import RePaint, SplitGibbs
from ldm.jumps import SCALE, SPAN, Aim, Jumping, jumping, jumps, plainly
from ldm.noise import Noise
from ldm.objectives import DenoisingConfig
from ldm.objectives.progressive import ProgressiveConfig
from ldm.pipeline import Pipeline, Sampling
from ldm.samplers import DDIM, DDPM, ConsistencySampler, DPMpp2M, JumpSampler, Sampler, Snapshot, prior, sample
from ldm.schedules import EDM, VP, Flow, NoiseSchedule
from ldm.students import NO_STUDENT, Student, check_held, check_negatives, check_plan, in_steps, unguided
from ldm.tasks import Task
from ldm.thresholding import Thresholded, thresholded

AIMS: tuple[Aim, ...] = ("any", "clean", "next", "none")
PLAN = Sampling(sampler=JumpSampler(), grid=Uniform(), guidance=ClassifierFree(scale=1.0), steps=1)
FOUR = replace(PLAN, steps=4)
PLAIN = replace(PLAN, sampler=DPMpp2M(), steps=9)
BAKED, RANGE = Student(guidance_scale=3.0), Student(guidance_scale=(1.0, 8.0))
TOLD = replace(PLAN, guidance=Embedded(scale=3.0))
processes = each("schedule", [Flow(), VP(), EDM()])
few_step = each("sampler", [JumpSampler(), JumpSampler(noise=0.5), ConsistencySampler()])


def model(aim: Aim = "clean", data: Data | None = None) -> Jumping:
    """A few-step model of exact jumps: to where it is told, or to the clean end."""
    config: Any = SimpleNamespace(reads=(SPAN,) if aim == "any" else (), reading=plainly)
    return Jumping(network(config, data or Data(Flow())), flow_process(), plainly, aim == "any", aim, aim == "next")


def plain() -> Denoiser:
    return Denoiser(network(SimpleNamespace(reads=(), reading=plainly), Data(Flow())), flow_process())  # type: ignore[arg-type]


# How it may be drawn

REFUSED: dict[str, tuple[Denoiser, Student, Sampling, str]] = {
    "jumps of a denoiser": (plain(), NO_STUDENT, PLAN, "jump takes the steps of a few-step .* dpmpp-2m, or teach"),
    "a denoiser to the end": (plain(), NO_STUDENT, replace(PLAN, sampler=ConsistencySampler()), "consistency takes"),
    "other steps": (model(), Student(steps=(1, 2)), FOUR, "draw in 1 or 2 steps, not in 4: give --steps 2"),
    "guided twice": (model(), BAKED, replace(PLAN, guidance=ClassifierFree(scale=3)), "3 is baked .*-scale 1$"),
    "a classifier on guidance": (model("any"), BAKED, replace(PLAIN, guidance=ByClassifier()), "is baked .*.kind out"),
    "told no scale": (model(), RANGE, PLAN, "is told its guidance scale, .*: give --guidance.kind embedded"),
    "told one for nothing": (model(), NO_STUDENT, TOLD, "not taught to be told one: leave --guidance.kind out"),
    "a denoiser told one": (plain(), NO_STUDENT, replace(PLAIN, guidance=Embedded()), "guidance embedded tells"),
    "told too much": (model(), RANGE, replace(PLAN, guidance=Embedded(scale=9.0)), "from 1 to 8, not 9: .* 8$"),
    "told too little": (model(), Student(guidance_scale=(2.0, 8.0)), replace(PLAN, guidance=Embedded(scale=1.0)),
                        "from 2 to 8, not 1: give --guidance-scale 2"),
    "by the picture too": (model("any"), BAKED, replace(PLAIN, image_scale=1.5), "by the picture, would count twice"),
    "a step of no denoiser": (model("clean"), NO_STUDENT, PLAIN, "dpmpp-2m asks .*: give --sampler consistency"),
    "a step of no denoiser's grid": (model("next"), NO_STUDENT, PLAIN, "dpmpp-2m asks .*: give --sampler jump"),
    "on from the clean end": (model("clean"), NO_STUDENT, FOUR, "give --sampler consistency"),
    "to an end not taught": (model("next"), NO_STUDENT, replace(FOUR, sampler=ConsistencySampler()), "--sampler jump"),
    "noise on straight ways": (model("none"), NO_STUDENT, replace(FOUR, sampler=ConsistencySampler()), "step by step"),
    "another grid": (model("next"), NO_STUDENT, replace(FOUR, grid=Karras()), "grid uniform, and karras visits others"),
    "a shifted grid": (model("next"), NO_STUDENT, replace(FOUR, grid=Uniform(shift=3.0)), "without a shift"),
    "to the end from another grid": (replace(model(), own_grid=True), NO_STUDENT, replace(
        FOUR, sampler=ConsistencySampler(), grid=Karras()), "grid uniform, and karras visits others"),
    "a jump farther": (model("next"), NO_STUDENT, replace(FOUR, sampler=JumpSampler(noise=0.5)), "--sampler.noise 0"),
    "guided jumps": (model("any"), NO_STUDENT, replace(FOUR, guidance=ClassifierFree(scale=2.0)),
                     "guidance classifier-free mixes .* set its scale to 1, or take --sampler dpmpp-2m with more"),
    "guided jumps of no denoiser": (model(), NO_STUDENT, replace(PLAN, guidance=Autoguidance()), "or draw with its"),
    "judged jumps": (model("any"), NO_STUDENT, replace(FOUR, guidance=ByClassifier()), "guidance classifier mixes"),
    "jumps by a picture": (model("any"), NO_STUDENT, replace(FOUR, image_scale=1.5), r"\(image_scale\) mixes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_was_not_taught_is_refused(case: str) -> None:
    denoiser, student, plan, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        check_plan(student, plan, denoiser)


DRAWN: dict[str, tuple[Denoiser, Student, Sampling]] = {
    "a denoiser": (plain(), NO_STUDENT, replace(PLAIN, guidance=ClassifierFree(scale=3.0))),
    "a denoiser by the picture": (plain(), NO_STUDENT, replace(PLAIN, image_scale=1.5)),
    "scale 1 in it": (model("any"), Student(guidance_scale=1.0), replace(PLAIN, guidance=ClassifierFree(scale=3.0))),
    "guidance in it": (model(), BAKED, PLAN), "told": (model(), RANGE, TOLD),
    "told the least": (model(), RANGE, replace(TOLD, guidance=Embedded(scale=1.0))),
    "one of its steps": (model("any"), Student(steps=(1, 4)), FOUR),
    "any jump": (model("any"), NO_STUDENT, replace(FOUR, grid=Karras(), sampler=JumpSampler(noise=0.5))),
    "any jump to the end": (model("any"), NO_STUDENT, replace(FOUR, sampler=ConsistencySampler())),
    "the denoiser in it": (model("any"), NO_STUDENT, replace(PLAIN, guidance=ClassifierFree(scale=3.0))),
    "straight ways": (model("none"), BAKED, PLAIN), "straight steps": (model("none"), NO_STUDENT, FOUR),
    "the end, again and again": (model("clean"), NO_STUDENT, replace(FOUR, sampler=ConsistencySampler())),
    "the end at once": (model("clean"), NO_STUDENT, replace(PLAN, sampler=ConsistencySampler())),
    "its own grid": (model("next"), NO_STUDENT, FOUR),
    "the end from its own grid": (replace(model(), own_grid=True), NO_STUDENT, replace(
        FOUR, sampler=ConsistencySampler())),
    "its own grid, as numbers": (model("next"), NO_STUDENT, replace(FOUR, grid=Given(times=(1.0, 0.75, 0.5, 0.25, 0)))),
    "its only step": (model("next"), NO_STUDENT, replace(PLAN, sampler=ConsistencySampler())),
    "no judge": (model(), NO_STUDENT, replace(PLAN, guidance=ByClassifier(strength=0.0))),
}  # fmt: skip


@pytest.mark.parametrize("case", DRAWN)
def test_what_was_taught_is_not(case: str) -> None:
    denoiser, student, plan = DRAWN[case]
    check_plan(student, plan, denoiser)


def test_prompts_that_would_do_nothing_are_refused() -> None:
    for student in (BAKED, RANGE):
        with pytest.raises(ValueError, match="a negative prompt does nothing here"):
            check_negatives(student, PLAN, model(), ["", "red"], False)
        with pytest.raises(ValueError, match="has taken its guidance in: leave --also out"):
            check_negatives(student, PLAN, model(), [""], True)
    with pytest.raises(ValueError, match="jump asks where x goes: leave --also out, or take --sampler dpmpp-2m"):
        check_negatives(NO_STUDENT, PLAN, model("any"), [""], True)
    with pytest.raises(ValueError, match="leave --also out, or draw with its teacher"):
        check_negatives(NO_STUDENT, PLAN, model("next"), [""], True)
    check_negatives(NO_STUDENT, PLAIN, model("any"), ["red"], True)
    check_negatives(Student(guidance_scale=1.0), PLAIN, model("any"), ["red"], True)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), (3.0, 1.0), (2.0, 2.0), (1.0, 2.0, 3.0)])
def test_scales_that_are_none(scale: Any) -> None:
    with pytest.raises(ValueError, match="guidance_scale must be one number above 0, or two that rise"):
        Student(guidance_scale=scale)


def test_what_a_student_says_of_itself() -> None:
    assert [in_steps(steps) for steps in ((), (1,), (2,), (1, 4))] == [
        "any number of steps", "1 step", "2 steps", "1 or 4 steps"]
    assert Student(steps=(1,)).words == "drawn in 1 step, no guidance in it"
    assert BAKED.words == "drawn in any number of steps, guidance at scale 3 baked in"
    assert Student(guidance_scale=1.0).words.endswith("no guidance in it") and RANGE.words.endswith("from 1 to 8")
    assert (NO_STUDENT.reads, BAKED.reads, RANGE.reads) == ((), (), (SCALE,))
    with pytest.raises(ValueError, match="at least 1"):
        Student(steps=(0,))


# What keeps its jumps


@processes
def test_jumps_of_the_judge_are_those_of_the_data(schedule: NoiseSchedule) -> None:
    """`Isotropic`, beside the same written apart."""
    oracle, data, x = Isotropic(schedule, 0.5, 0.3), Data(schedule, 0.5, 0.3), torch.tensor([[1.3], [-0.4]], dtype=F64)
    for t, s in ((1.0, 0.4), (0.7, 0.0), (0.5, 0.5)):
        for got, wanted in zip(oracle.jump(x, scalar(t), scalar(s))[:2], data.jump(x, scalar(t), scalar(s))[:2],
                               strict=True):  # fmt: skip
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def walk(sampler: Sampler, denoise: Denoise, steps: int, shape: tuple[int, ...] = (2, 3, 4)) -> Tensor:
    noise, schedule = Noise.from_seeds([1, 2]), denoise.schedule
    return sample(sampler, denoise, prior(schedule, shape, noise, F64), Uniform()(steps, schedule), noise)


@processes
@few_step
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_hole_is_jumped_as_without_a_mask_and_the_rest_is_known(
    sampler: Sampler, schedule: NoiseSchedule, steps: int
) -> None:
    known = Noise.from_seeds([5, 6]).normal((2, 3, 4), "known", dtype=F64)
    hole = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    hole[..., 1:, 2:] = True
    made, alone = (walk(sampler, one, steps) for one in (Known(Isotropic(schedule), hole, known), Isotropic(schedule)))
    wanted = torch.where(hole, alone, known)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-9)  # from t = 1, where x is 80 on `edm`


@processes
@few_step
def test_windows_of_independent_pixels_jump_as_the_whole_does(sampler: Sampler, schedule: NoiseSchedule) -> None:
    oracle = Isotropic(schedule, 0.5, 0.3)
    whole, parts = (walk(sampler, one, 3, (2, 5, 7)) for one in (oracle, Windows(oracle, (3, 4), 2)))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-11)
    counted = Counted(oracle)
    walk(sampler, Windows(counted, (8, 8), 1), 3, (2, 5, 7))
    assert len(counted.times) == 3


@processes
def test_only_where_it_lands_is_scaled_into_range(schedule: NoiseSchedule) -> None:
    """And x0 and eps still make up x_t."""
    oracle, t = Isotropic(schedule, 2.0, 0.3), scalar(0.7)
    x = 3 * marginal(schedule, t, 2.0) ** 0.5 * Noise.from_seeds([1, 2]).normal((1, 4, 4), dtype=F64)
    held, (alpha, sigma) = Thresholded(oracle, 0.9), schedule(t)
    inside, landed = held.jump(x, t, scalar(0.3)), held.jump(x, t, scalar(0.0))
    for got, wanted in zip(inside[:2], oracle.jump(x, t, scalar(0.3))[:2], strict=True):
        assert torch.equal(got, wanted)
    free = oracle.jump(x, t, scalar(0.0)).x0
    assert free.abs().max() > 1 and torch.equal(landed.x0, thresholded(free, 0.9)) and landed.x0.abs().max() <= 1
    torch.testing.assert_close(alpha * landed.x0 + sigma * landed.eps, x)


def test_a_wrapper_of_a_plain_denoiser_has_no_jump() -> None:
    oracle, hole = two_modes(Flow()), torch.ones(1, 1, 2, 2, dtype=torch.bool)
    for held in (Known(oracle, hole, torch.zeros(1)), Windows(oracle, (2, 2), 1), Thresholded(oracle), Counted(oracle)):
        assert not jumps(held)
        with pytest.raises(ValueError, match="what it is given has no jump"):
            jumping(held)
    twice = Thresholded(Known(Windows(Isotropic(Flow()), (2, 2), 1), hole, torch.zeros(1)))
    assert jumps(twice) and not jumps(Known(Windows(oracle, (2, 2), 1), hole, torch.zeros(1)))


def test_what_hides_the_jump_is_told_apart() -> None:
    held = Bound(Flow(), Isotropic(Flow()))
    with pytest.raises(ValueError, match="asks where x goes: take --sampler dpmpp-2m"):
        check_held(model("any"), JumpSampler(), held)
    with pytest.raises(ValueError, match="sampler consistency asks where x goes: draw with its teacher"):
        check_held(model("clean"), ConsistencySampler(), held)
    check_held(model("any"), DPMpp2M(), held)
    check_held(model("clean"), JumpSampler(), Isotropic(Flow()))


# Pipelines


def text(captions: Sequence[str]) -> Cond:
    return Cond(torch.zeros(len(captions), 1, 1), torch.ones(len(captions), 1, dtype=torch.bool))


def pipeline(aim: Aim = "clean", student: Student = NO_STUDENT, plan: Sampling = PLAN) -> Pipeline:
    """Pictures of 4 x 4 pixels, each N(0.2, 1/16)."""
    denoiser = model(aim, Data(Flow(), 0.25, 0.2))
    return Pipeline(Identity().build(), denoiser, text, plan, (4, 4), student=student)  # type: ignore[arg-type]


def latents(pipeline: Pipeline, count: int, task: Task | None = None, plan: Sampling | None = None) -> Tensor:
    plan = plan or pipeline.sampling
    noise = Noise.from_seeds(range(count))
    return pipeline.latents(pipeline.guided(["a"] * count, plan=plan), noise, (3, 4, 4), plan, task or Task())


@pytest.mark.parametrize(("aim", "plan"), [
    ("any", PLAN), ("any", FOUR), ("any", replace(FOUR, sampler=ConsistencySampler())), ("clean", PLAN),
    ("clean", replace(FOUR, sampler=ConsistencySampler())), ("next", PLAN),
])  # fmt: skip
def test_an_exact_student_draws_its_data_in_any_steps(aim: Aim, plan: Sampling) -> None:
    made = latents(pipeline(aim, plan=plan), 400)
    assert made.mean().item() == pytest.approx(0.2, abs=0.01) and made.std().item() == pytest.approx(0.25, abs=0.005)


def test_a_scale_is_told_and_kept_within_its_range() -> None:
    told, own = list[Tensor](), network(SimpleNamespace(reads=(), reading=plainly), Data(Flow()))  # type: ignore[arg-type]

    def heard(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        told.append(cond.extras[SCALE])
        return own(x, level, cond)

    made = replace(pipeline(student=RANGE, plan=TOLD), denoiser=Jumping(heard, flow_process(), aim="clean"))
    assert len(made(["a", "b"], guidance_scale=5)) == 2 and told[-1].tolist() == [5.0, 5.0]
    assert len(made("a")) == 1 and told[-1].tolist() == [3.0]
    with pytest.raises(ValueError, match="from 1 to 8, not 9"):
        made("a", guidance_scale=9)
    with pytest.raises(ValueError, match="a negative prompt does nothing here"):
        made("a", negative_prompt="b")


def test_the_fields_words_reach_the_checks() -> None:
    baked = pipeline(student=BAKED)
    assert translated("a", 0, {"guidance_scale": 3}, PLAN)[2]["sampling"] == replace(
        PLAN, guidance=ClassifierFree(scale=3.0))
    with pytest.raises(ValueError, match="is baked into this student"):
        baked("a", guidance_scale=3)
    with pytest.raises(ValueError, match="give --sampler consistency"):
        baked("a", num_inference_steps=4)
    with pytest.raises(ValueError, match="is baked into this student"):
        baked.guided("a", plan=replace(PLAN, guidance=ClassifierFree(scale=3.0)))
    assert len(baked("a", guidance_scale=1)) == 1


def test_it_says_that_it_is_a_student() -> None:
    said = repr(pipeline(student=replace(BAKED, steps=(1,))))
    assert "a few-step model, drawn in 1 step, guidance at scale 3 baked in" in said
    assert "few-step" not in repr(replace(pipeline(), denoiser=plain(), sampling=PLAIN))


PICTURE = (torch.arange(48, dtype=torch.uint8) * 5).view(1, 3, 4, 4)


def begun(student: Pipeline, **how: Any) -> Tensor:
    task = image_to_image(student, PICTURE, **how)(slice(0, 1))
    return latents(student, 1, task)


def test_a_picture_is_begun_from_where_something_of_it_is_left() -> None:
    """One jump from the picture noised to t = 0.4, as closed form; a strength that says all or nothing is refused."""
    student = pipeline("clean")
    for strength, share in ((0.8, "all"), (0.4, "none")):
        with pytest.raises(ValueError, match=f"strength {strength:g} of 1 step is {share} of the way.*--start-time T"):
            begun(student, strength=strength)
    z, eps = PICTURE / 127.5 - 1, Noise.from_seeds([0]).normal((3, 4, 4), "prior")
    wanted = Data(Flow(), 0.25, 0.2).moved((0.6 * z + 0.4 * eps).double(), torch.tensor([0.4], dtype=F64),
                                           torch.zeros(1, dtype=F64))  # fmt: skip
    torch.testing.assert_close(begun(student, start_time=0.4).double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(begun(student, start_time=0), z)
    assert torch.equal(begun(student, strength=1), latents(student, 1))


def test_a_student_of_its_own_grid_begins_there() -> None:
    student = pipeline("next", plan=FOUR)
    assert torch.equal(begun(student, strength=0.8), begun(student, start_time=0.75))
    with pytest.raises(ValueError, match="alone, not from 0.4: give --start-time 0.75 or 0.5 or 0.25"):
        begun(student, start_time=0.4)
    with pytest.raises(ValueError, match="strength 0.9 of 4 steps is all of the way.* 0.75 or 0.5 or 0.25"):
        begun(student, strength=0.9)
    with pytest.raises(ValueError, match="strength 0.5 of 1 step .*: draw with its teacher"):
        begun(pipeline("next"), strength=0.5)


def test_the_objective_says_where_its_model_goes() -> None:
    made = ProgressiveConfig(from_steps=4, steps=2).denoiser(plain().backbone, flow_process())
    assert isinstance(made, Jumping) and (made.aim, made.own_grid, made.spans, made.denoises) == (
        "next", True, False, False)  # fmt: skip
    told = replace(ProgressiveConfig(), from_steps=2)
    assert (told.aim, told.own_grid, DenoisingConfig().own_grid) == ("next", True, False)
    assert [model(aim).denoises for aim in AIMS] == [True, False, False, True]


def test_a_hole_is_filled_around_what_is_known() -> None:
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2:] = True
    for plan in (PLAN, replace(FOUR, sampler=ConsistencySampler())):
        student = pipeline("clean", plan=plan)
        (made,) = student.pixels("a", 0, task=inpainting(student, PICTURE, mask, dilate=0))
        (alone,) = student.pixels("a", 0)
        assert torch.equal(made, torch.where(mask, alone, PICTURE))


def test_what_asks_for_a_denoiser_refuses_the_others() -> None:
    operator, y = Box(factor=2), torch.zeros(1, 3, 2, 2)
    hole = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for aim in ("clean", "next"):
        student, said = pipeline(aim), "asks what a noisy sample may have been, and this student .*: take its teacher"
        for method in (DDNM(), SplitGibbs()):
            with pytest.raises(ValueError, match=f"{method.kind} {said}"):
                restoration(student, operator, y, 0.1, method)
        with pytest.raises(ValueError, match=f"repaint {said}"):
            inpainting(student, PICTURE, hole, posterior=RePaint())
        for invert in (lambda student=student: inverted(student, PICTURE / 127.5 - 1, "a"),
                       lambda student=student: edit_friendly_inversion(student, PICTURE, "a")):
            with pytest.raises(ValueError, match=f"inversion {said}"):
                invert()
        with pytest.raises(ValueError, match=f"this measure {said}"):
            unguided(NO_STUDENT, student.denoiser, "this measure")


def test_a_student_that_denoises_is_measured_and_inverted_with_more_steps() -> None:
    student, many = pipeline("any"), replace(PLAN, sampler=DDIM(), steps=60)
    operator, y = Box(factor=2), torch.full((1, 3, 2, 2), 0.4)
    task = restoration(student, operator, y, 0.01, DDNM())(slice(0, 1))
    with pytest.raises(ValueError, match="sampler jump asks where x goes: take --sampler dpmpp-2m"):
        latents(student, 1, task)
    made = latents(student, 1, task, many)
    assert (operator(made) - y).abs().max() < 0.05
    images = PICTURE / 255 * 0.5
    noise = inverted(student, images, "a", many, iterations=20)
    torch.testing.assert_close(latents(student, 1, Task(start=noise), many), images, rtol=0, atol=0.01)


def test_an_inversion_is_told_the_scale_of_the_drawing() -> None:
    told = list[float]()
    own = model("any")

    def heard(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        told.extend(cond.extras[SCALE].tolist())
        return own.backbone(x, level, cond)

    plan = replace(TOLD, sampler=DDIM(), steps=2)
    student = replace(pipeline("any", RANGE, plan), denoiser=replace(own, backbone=heard))
    inverted(student, PICTURE / 127.5 - 1, "a")
    assert told == [3.0, 3.0]


def test_the_denoiser_of_the_data_itself() -> None:
    denoiser = model("any")
    assert unguided(NO_STUDENT, denoiser, "x") is denoiser and unguided(Student(guidance_scale=1.0), denoiser, "x")
    with pytest.raises(ValueError, match="--classify asks for the data's own .* of scale 3: take its teacher"):
        unguided(BAKED, denoiser, "--classify")
    with pytest.raises(ValueError, match="scale 2 to 8"):
        unguided(Student(guidance_scale=(2.0, 8.0)), denoiser, "--classify")
    told = list[Tensor]()

    def heard(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        told.append(cond.extras[SCALE])
        return x

    unguided(RANGE, Jumping(heard, flow_process()), "x")(torch.zeros(2, 1), scalar(0.5), text(["a", "b"]))
    assert told[0].tolist() == [1.0, 1.0]


def test_steps_are_watched_as_they_are_jumped() -> None:
    shots = list[Snapshot]()
    student = pipeline("any", plan=FOUR)
    list(student.pixels("a", watch=shots.append))
    assert [shot.calls for shot in shots] == [1, 2, 3, 4] and shots[-1].t == 0


def test_an_ancestral_walk_of_a_student_that_denoises_is_its_picture_again() -> None:
    student = pipeline("any", plan=replace(PLAN, sampler=DDPM(), steps=6))
    task = edit_friendly_inversion(student, PICTURE, "a", strength=1.0)(slice(0, 1))
    torch.testing.assert_close(latents(student, 1, task), PICTURE / 127.5 - 1, rtol=0, atol=1e-5)
