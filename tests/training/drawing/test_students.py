"""Drawing with a few-step model: its picture says what it was taught and is drawn again; what it was not is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from ldm.guidance import ClassifierFree, Embedded
from ldm.jumps import Jumping
from ldm.noise import Noise
from ldm.samplers import JumpSampler
from training.errors import UserError
from training.models.assembly import load_pipeline
from training.pictures import grids
from training.studio.facts import read
from training.studio.model import Studio

Draw = Callable[..., Path]


@pytest.fixture
def draw(taught: Path, tmp_path: Path) -> Draw:
    """One picture of a model's, by flags."""
    count = iter(range(100))

    def drawn(model: str, *words: object, prompt: bool = True) -> Path:
        output, asked = tmp_path / f"drawn-{next(count)}", ["--prompt", "a red circle"] if prompt else []
        where = ("--model", taught / model, "--output", output, "--device", "cpu")
        assert tiny.call("generate", *where, *asked, *words) == 0
        return output / "00000.png"

    return drawn


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(path := tmp_path / "picture.png")
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    values = np.zeros((32, 32), np.uint8)
    values[8:20, 8:20] = 255
    Image.fromarray(values).save(path := tmp_path / "mask.png")
    return path


def refused(model: Path, output: Path, *words: object) -> UserError:
    return tiny.refused("generate", "--model", model, "--output", output / "refused", "--device", "cpu", "--prompt",
                        "a red circle", *words)  # fmt: skip


def test_a_picture_says_how_its_model_was_taught(draw: Draw, taught: Path) -> None:
    teacher = json.loads((taught / "baked" / "final" / "teacher.json").read_text())
    assert teacher["name"] == "teacher" and len(teacher["hashes"]["denoiser"]) == 64
    told = {name: grids.facts(draw(name))["student"] for name in ("baked", "told")}
    assert told == {name: {"steps": [1], "guidance_scale": scales, "teacher": teacher}
                    for name, scales in (("baked", [2.0]), ("told", [1.0, 8.0]))}  # fmt: skip
    assert "student" not in grids.facts(draw("teacher", "--steps", 1))


@pytest.mark.parametrize("words", [(), ("--guidance-scale", 5.5), ("--num-images", 2, "--batch-size", 2)], ids=str)
def test_it_is_drawn_again_from_what_it_says(
    words: tuple[object, ...], draw: Draw, capsys: pytest.CaptureFixture[str]
) -> None:
    first = draw("told", *words)
    draw("told", "--like", first, prompt=False)
    assert f"the same pixels as {first}" in capsys.readouterr().err
    facts = grids.facts(first)
    assert facts["settings"]["guidance"] == {"kind": "embedded", "scale": 5.5 if "--guidance-scale" in words else 2.0}
    assert facts["settings"]["sampler"]["kind"] == "jump" and facts["settings"]["sample"]["steps"] == 1


def test_a_picture_of_its_teacher_is_not_its_own(draw: Draw, taught: Path, tmp_path: Path) -> None:
    words = ("--model", taught / "baked", "--output", tmp_path / "again", "--device", "cpu")
    problem = tiny.refused("generate", *words, "--like", draw("told"))
    assert problem.code == 2 and "embedded tells a student its scale, and this model" in problem.what
    problem = tiny.refused("generate", *words, "--like", draw("teacher", "--steps", 1, "--guidance-scale", 1,
                                                              "--sampler", "ddim"))  # fmt: skip
    assert "sampler ddim asks" in problem.what


def test_one_jump_is_what_is_drawn(taught: Path) -> None:
    """From the noise of the seed, by one call of the network, told the scale; it is heard."""
    pipeline = load_pipeline(taught / "told", "cpu")
    assert isinstance(pipeline.denoiser, Jumping) and pipeline.denoiser.aim == "next"
    assert pipeline.sampling.sampler == JumpSampler() and pipeline.sampling.guidance == Embedded(scale=2.0)
    noise, shape = Noise.from_seeds([5]), pipeline.latent_shape(pipeline.size)
    x, t = noise.normal(shape, "prior"), torch.ones((), dtype=torch.float64)
    cond = pipeline.text(["a red circle"])
    with torch.no_grad():
        y = pipeline.denoiser.backbone(x, torch.tensor([1000.0]), cond._replace(extras={"guidance_scale": 2 * t[None]}))
        latents = pipeline.latents(pipeline.guided("a red circle"), noise, shape, pipeline.sampling)
    torch.testing.assert_close(latents, x - y, rtol=0, atol=1e-5)
    baked = load_pipeline(taught / "baked", "cpu")
    assert baked.sampling.guidance == ClassifierFree(scale=1.0) and baked.student.scales == (2.0,)
    assert "drawn in 1 step, guidance at scale 2 baked in" in repr(baked)
    assert "drawn in 1 step, told a guidance scale from 1 to 8" in repr(pipeline)


FLAGS: dict[str, tuple[str, str, str]] = {  # of each: the model, the flags, and what is said
    "steps": ("baked", "--steps 3", "taught to draw in 1 step, not in 3"),
    "a plain sampler": ("baked", "--sampler dpmpp-2m", "sampler dpmpp-2m asks what a noisy sample may have been"),
    "guidance": ("baked", "--guidance-scale 3", "scale 2 is baked into this student"),
    "adaptive guidance": ("baked", "--guidance.kind apg", "is baked into this student"),
    "a classifier": ("told", "--guidance.kind classifier", "is told its guidance scale, and another"),
    "too much": ("told", "--guidance-scale 9", "taught guidance scales from 1 to 8, not 9"),
    "a negative prompt": ("told", "--negative-prompt blue", "a negative prompt does nothing here"),
    "a further caption": ("baked", "--also 1 blue", "has taken its guidance in"),
    "a part of the walk": ("baked", "--image PICTURE", "strength 0.8 of 1 step is all of the way"),
    "a time of no grid": ("baked", "--image PICTURE --start-time 0.5", "not from 0.5: draw with its teacher"),
    "an inversion": ("baked", "--invert PICTURE", "inversion asks what a noisy sample may have been"),
    "edit-friendly": ("told", "--invert PICTURE --edit-friendly", "inversion asks what a noisy sample"),
    "a style": ("baked", "--style PICTURE", "inversion asks what a noisy sample"),
    "a restoration": ("told", "--restore box --image PICTURE", "pigdm asks what a noisy sample"),
    "a posterior": ("baked", "--restore box --image PICTURE --method ddrm", "ddrm asks what a noisy sample"),
    "a hole by a posterior": ("baked", "--image PICTURE --mask MASK --method repaint", "repaint asks what a noisy"),
    "a weaker model": ("told", "--guidance.kind autoguidance --weak-model TEACHER", "is told its guidance scale"),
    "a picture's guidance": ("told", "--image-guidance-scale 1.5", "by the picture, would count twice"),
    "jumps of its teacher": ("teacher", "--sampler jump", "jump takes the steps of a few-step model"),
    "the clean end of its teacher": ("teacher", "--sampler consistency", "consistency takes the steps of a few-step"),
    "a scale for its teacher": ("teacher", "--guidance.kind embedded", "was not taught to be told one"),
    "a student as the weaker": ("teacher", "--guidance.kind autoguidance --weak-model BAKED", "is a few-step model"),
}  # fmt: skip


@pytest.mark.parametrize("case", FLAGS)
def test_what_it_was_not_taught_is_one_sentence(
    case: str, taught: Path, picture: Path, mask: Path, tmp_path: Path
) -> None:
    model, flags, said = FLAGS[case]
    meant = {"PICTURE": picture, "MASK": mask, "TEACHER": taught / "teacher", "BAKED": taught / "baked"}
    problem = refused(taught / model, tmp_path, *(meant.get(word, word) for word in flags.split()))
    assert said in problem.what and problem.hint and "\n" not in problem.what


GOES = ["--strip", "--sampler consistency", "--size 48 --windows 4", "--image PICTURE --mask MASK", "--tile 16",
        "--image PICTURE --outpaint 0,0,16,0", "--coupling masactrl --source-prompt blue", "--mixed-precision bf16",
        "--image PICTURE --strength 1", "--image PICTURE --strength 0"]  # fmt: skip


@pytest.mark.parametrize("flags", GOES)
@pytest.mark.parametrize("model", ["baked", "told"])
def test_what_keeps_its_jumps_is_drawn(model: str, flags: str, draw: Draw, picture: Path, mask: Path) -> None:
    meant = {"PICTURE": picture, "MASK": mask}
    made = np.asarray(Image.open(draw(model, *(meant.get(word, word) for word in flags.split()))))
    if "--mask" in flags:
        hole = np.asarray(Image.open(mask)) > 0
        assert (made == np.asarray(Image.open(picture)))[~hole].all() and made[hole].std() > 0


def test_what_is_told_can_be_followed(taught: Path, draw: Draw, tmp_path: Path) -> None:
    """The hint of each refusal by flags, as flags."""
    for model, wrong, right in (
        ("baked", "--steps 3", "--steps 1"), ("baked", "--guidance-scale 3", "--guidance-scale 1"),
        ("baked", "--sampler ddim", "--sampler jump"), ("told", "--guidance-scale 9", "--guidance-scale 8"),
        ("told", "--guidance.kind apg", "--guidance.kind embedded"),
        ("teacher", "--sampler jump", "--sampler dpmpp-2m"),
        ("teacher", "--guidance.kind embedded", "--guidance.kind classifier-free"),
        ("baked", "--guidance.kind apg", "--guidance-scale 1"),
    ):  # fmt: skip
        assert right in refused(taught / model, tmp_path, *wrong.split()).hint
        draw(model, *right.split(), *(["--steps", 2] if model == "teacher" else []))


def test_an_adapter_of_its_teacher_is_not_its_own(taught: Path, latents: Path, tmp_path: Path) -> None:
    words = ("--base", taught / "teacher", "--latents", latents, "--config", "lora", *tiny.SHORT, "--max-steps", 1)
    assert tiny.call("train_denoiser", *words, "--output", tmp_path / "lora") == 0
    problem = refused(taught / "baked", tmp_path, "--adapter", tmp_path / "lora")
    assert problem.code == 4 and "was learned upon teacher, whose denoiser is" in problem.what


def test_a_preview_draws_it_too(taught: Path, shapes: Path, draw: Draw, tmp_path: Path) -> None:
    teach = ("--data", shapes, "--device", "cpu", "--batch-size", 8, "--max-steps", 1, "--config", "tiny")
    own = taught / "baked" / "final" / "autoencoder"
    assert tiny.call("train_autoencoder", *teach, "--num-workers", 0, "--teacher", own, "--output", tmp_path / "p") == 0
    assert grids.facts(draw("baked", "--preview", tmp_path / "p"))["student"]["steps"] == [1]


def test_it_says_the_same_when_it_is_exported_or_goes_on_from_a_checkpoint(
    taught: Path, draw: Draw, tmp_path: Path
) -> None:
    words = (taught / "told", "--output", tmp_path / "small", "--dtype", "bfloat16")
    assert tiny.call("export_model", *words) == 0
    assert tiny.call("publish", tmp_path / "small", "--repo", "me/mine", "--dry-run") == 0
    (newest,) = (taught / "told" / "checkpoints").glob("step-*")
    facts = [grids.facts(draw(str(model)))["student"] for model in ("told", tmp_path / "small", newest)]
    assert facts[0] == facts[1] == facts[2]
    card = (tmp_path / "small" / "README.md").read_text()
    assert "It draws in 1 step. It is told its guidance scale, 1 to 8" in card


def test_the_card_of_a_student_says_its_steps_and_its_guidance(taught: Path) -> None:
    card = (taught / "baked" / "final" / "README.md").read_text()
    told = "taught by teacher, whose hashes are in [teacher.json](teacher.json). It draws in 1 step. Guidance at scale"
    assert f"It is a few-step model (progressive), {told} 2 is baked in: give no other." in card
    assert "where one jump from this noise level lands" in card and "the objective at this noise level" not in card
    plain = (taught / "teacher" / "final" / "README.md").read_text()
    assert "few-step" not in plain and "the objective at this noise level" in plain


def test_a_student_in_a_cascade_must_fit_as_any_model(taught: Path, upscaler: Path, tmp_path: Path) -> None:
    words = ("--cascade", taught / "baked", "--cascade", upscaler, "--prompt", "red", "--device", "cpu", "--steps", 2)
    problem = tiny.refused("generate", *words, "--output", tmp_path / "out")
    assert "makes 32x32 pixels of 8x8" in problem.what


def test_the_studio_offers_what_it_was_taught(taught: Path, tmp_path: Path) -> None:
    studios = {name: Studio.opened(str(taught / name), tmp_path / name, None, "cpu", None)
               for name in ("baked", "told", "teacher")}  # fmt: skip
    kinds = {name: studio.samplers() for name, studio in studios.items()}
    assert kinds["baked"] == kinds["told"] == ["jump", "consistency"]
    assert {"dpmpp-2m", "euler", "ddpm"} <= {*kinds["teacher"]} and not {"jump", "consistency"} & {*kinds["teacher"]}
    assert {name: studio.scales() for name, studio in studios.items()} == {
        "baked": [1], "told": [1, 4.5, 8], "teacher": [1, 3, 6]}  # fmt: skip
    for name, studio in studios.items():
        with studio.turn() as turn:
            made = turn.draw(["--prompt", "a red circle", "--sampler", kinds[name][0]])
        assert len(made.pictures) == 1 and made.calls == (1 if name != "teacher" else 2)
        told = read(studio, str(made.pictures[0]))[0]
        assert ("taught by teacher" in told) == (name != "teacher") and ("[2.0], taught" in told) == (name == "baked")
