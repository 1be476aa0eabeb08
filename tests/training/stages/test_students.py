"""Students of every kind of teacher that they can learn from: taught, exported, drawn; stopped and gone on with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import students
import tiny
import torch
from donors import frozen_encoder
from PIL import Image
from stopped import same, stop_at

from ldm.jumps import SCALE
from ldm.noise import Noise
from ldm.thresholding import thresholded
from training.models.assembly import load_pipeline
from training.tensors import load_tensors

TINY = ["--backbone.width", "16", "--backbone.depth", "1", "--sample.steps", "1", "--max-steps", "1"]


def teach(teacher: Path, latents: Path, output: Path, *words: object) -> Path:
    """A student of a few steps, which moved, and its teacher, which did not."""
    before = load_tensors(teacher / "final" / "model.safetensors")
    students.student(teacher, latents, output, "--lr", "0.01", "--optimizer.warmup", 0, *words)
    after = load_tensors(teacher / "final" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    own = load_tensors(output / "final" / "model.safetensors")
    assert not all(torch.equal(own[name], tensor) for name, tensor in before.items() if name in own)
    return output


def drawn(run: Path, *words: object, prompt: str = "a red circle") -> None:
    where = ("--model", run, "--prompt", prompt, "--output", run / "pictures", "--device", "cpu")
    assert tiny.call("generate", *where, *words) == 0


def evaluated(run: Path, *words: object) -> int:
    return tiny.call("evaluate", "--model", run, "--device", "cpu", "--count", 4, "--batch-size", 4, *words)


def pairs(root: Path) -> Path:
    """Packed pictures of 32 pixels, each with what it was made of beside it."""
    for name in ("pictures", "sources"):
        (root / name).mkdir()
    for number in range(24):
        shade = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(shade).save(root / "pictures" / f"{number}.png")
        Image.fromarray(255 - shade).save(root / "sources" / f"{number}.png")
        (root / "pictures" / f"{number}.txt").write_text("a red circle")
    words = ("--resolution", 32, "--val-fraction", 0.3, "--hint", "picture", "--hint-files", root / "sources")
    assert tiny.call("make_shards", "pack", root / "pictures", *words, "--output", root / "packed") == 0
    return root / "packed"


@pytest.mark.parametrize("kind", ["masked", "low-res", "source", "hint"])
def test_a_teacher_that_is_shown_pictures(kind: str, shapes: Path, autoencoder: Path, tmp_path: Path) -> None:
    """So is its student, which is drawn as it is; guidance by the picture is none that a student takes in."""
    data, latents, base = shapes, tmp_path / "latents", tmp_path / "teacher"
    if kind == "hint":
        data = tmp_path / "shapes"
        pack = ("pack", "shapes", "--samples", 48, "--val-fraction", 0.2, "--hint", "edges", "--output", data)
        assert tiny.call("make_shards", *pack) == 0
    elif kind == "source":
        data = pairs(tmp_path)
    also = {"low-res": ["--low-res", 4], "source": ["--encode-hint"]}.get(kind, [])
    given = ("--autoencoder", autoencoder, "--data", data, "--output", latents, "--device", "cpu")
    assert tiny.call("encode_latents", *given, *also) == 0
    words = ("--latents", latents, *tiny.DENOISER, "--image.kind", kind, "--batch-size", 8, "--output", base)
    assert tiny.call("train_denoiser", *words) == 0
    tiny.shake(base / "final")
    run = teach(base, latents, tmp_path / "run")
    shown = {"masked": ["--image", "FINAL/shown.png", "--mask", "FINAL/hole.png"], "hint": ["--hint", "FINAL/hint.png"],
             "source": ["--image", "FINAL/shown.png"]}.get(kind)  # fmt: skip
    if shown:
        drawn(run, *(word.replace("FINAL", str(run / "final")) for word in shown))
        if kind == "hint":
            assert evaluated(run, "--data", data, "--hints") == 0
    else:
        assert evaluated(run, "--data", data, "--upscale", "--samples", 2) == 0
        where = ("--model", run, "--output", run / "pictures", "--device", "cpu")
        assert tiny.call("upscale", run / "final" / "shown.png", *where) == 0
        problem = tiny.refused("upscale", run / "final" / "shown.png", *where, "--overwrite", "--steps", 3)
        assert "taught to draw in 1 step, not in 3" in problem.what
        problem = tiny.refused("upscale", run / "final" / "shown.png", *where, "--overwrite", "--negative-prompt", "a")
        assert "a negative prompt does nothing here" in problem.what
    if kind == "source":
        again = ("--sample.image_scale", 1.5, "--dry-run")
        problem = tiny.refused("distill_denoiser", "--teacher", base, "--latents", latents, *students.SHORT, *again)
        assert "guidance by the picture" in problem.what and "--sample.image_scale 1" in problem.hint
        assert students.distill(base, latents, "--sample.image_scale", 1, "--dry-run") == 0
        words = ("--model", run, "--prompt", "a", "--output", tmp_path / "no", "--device", "cpu")
        shown_it = ("--image", run / "final" / "shown.png", "--image-guidance-scale", 2)
        problem = tiny.refused("generate", *words, *shown_it)
        assert "a second one, by the picture, would count twice" in problem.what


def test_a_teacher_of_labels_and_pixels(grey: Path, tmp_path: Path) -> None:
    """Whose pictures are scaled into their range where they land."""
    words = ("--latents", grey / "latents", *tiny.SHORT, *TINY, "--config", "smoke", "--text.kind", "label")
    also = ("--text.width", 16, "--sample.dynamic_threshold", 0.9, "--batch-size", 8)
    assert tiny.call("train_denoiser", *words, *also, "--output", tmp_path / "teacher") == 0
    tiny.shake(tmp_path / "teacher" / "final")
    run = teach(tmp_path / "teacher", grey / "latents", tmp_path / "run")
    ours, theirs = (load_pipeline(folder, "cpu") for folder in (run, tmp_path / "teacher"))
    assert ours.hashes["text_encoder"] == theirs.hashes["text_encoder"] and ours.sampling.dynamic_threshold == 0.9
    noise, shape, plan = Noise.from_seeds([0]), ours.latent_shape(ours.size), ours.sampling
    scaled, whole = (ours.latents(ours.guided("noise odd", plan=how), noise, shape, how)
                     for how in (plan, replace(plan, dynamic_threshold=0.0)))  # fmt: skip
    assert whole.abs().max() > 1 and torch.equal(scaled, thresholded(whole, 0.9))
    drawn(run, prompt="noise odd")
    problem = tiny.refused("distill_denoiser", "--teacher", tmp_path / "teacher", "--latents", grey / "latents",
                           *students.SHORT, "--text.width", 32, "--dry-run")  # fmt: skip
    assert "text.width: 16 -> 32" in problem.what


@pytest.mark.parametrize("stored", [False, True], ids=["read", "stored"])
def test_a_teacher_with_a_frozen_text_encoder(
    stored: bool, latents: Path, shapes: Path, autoencoder: Path, tmp_path: Path
) -> None:
    """Whose embeddings lie with the latents, or which reads the captions as it did for its teacher."""
    encoder, data = frozen_encoder(tmp_path / "encoder", 1), latents
    if stored:
        data = tmp_path / "latents"
        given = ("--autoencoder", autoencoder, "--data", shapes, "--device", "cpu", "--text-length", 12)
        assert tiny.call("encode_latents", *given, "--text-encoder", encoder, "--output", data) == 0
    config = '[backbone]\nkind = "dit"\nwidth = 16\ndepth = 1\nheads = 2\nbase_size = 8\n'
    (path := tmp_path / "frozen.toml").write_text(f'{config}[text]\nkind = "huggingface"\nlength = 12\n')
    words = ("--latents", data, *tiny.SHORT, "--config", path, "--sample.steps", 1, "--max-steps", 1)
    named = () if stored else ("--text-encoder", encoder)
    assert tiny.call("train_denoiser", *words, *named, "--output", tmp_path / "teacher") == 0
    tiny.shake(tmp_path / "teacher" / "final")
    run = teach(tmp_path / "teacher", data, tmp_path / "run", "--student.guidance_scale", "1,5")
    ours, theirs = (load_pipeline(folder, "cpu") for folder in (run, tmp_path / "teacher"))
    assert ours.hashes["text_encoder"] == theirs.hashes["text_encoder"] and ours.student.scales == (1.0, 5.0)
    drawn(run, "--guidance-scale", 4)


def test_a_teacher_that_is_not_finished(taught: Path, latents: Path, tmp_path: Path) -> None:
    """The student begins as its newest checkpoint is, averaged; one of no step of its own is that model."""
    teacher = Path(shutil.copytree(taught / "teacher", tmp_path / "teacher"))
    (teacher / "final" / "model.safetensors").unlink()
    run = students.student(teacher, latents, tmp_path / "run", "--lr", "1e-30", "--train.ema", 0)
    own, theirs = (load_pipeline(folder, "cpu") for folder in (run, teacher))
    x, cond = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), theirs.text(["a red circle"])
    answers = [pipeline.denoiser.backbone(x, torch.tensor([500.0]), cond) for pipeline in (own, theirs)]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-6)
    told = json.loads((run / "final" / "teacher.json").read_text())
    assert told == {"name": "teacher", "hashes": {name: theirs.hashes[name] for name in ("denoiser", "text_encoder")}}


@pytest.mark.parametrize("words", [
    ("--weighting.kind", "learned"), ("--times.kind", "loss-aware"), ("--times.stratified", "true"),
    ("--train.flip", "true"), ("--student.guidance_scale", "1,8"), ("--mixed-precision", "no", "--micro-batch-size", 4),
], ids=str)  # fmt: skip
def test_settings_that_a_student_may_have(
    words: tuple[object, ...], taught: Path, latents: Path, tmp_path: Path
) -> None:
    run = teach(taught / "teacher", latents, tmp_path / "run", *words)
    drawn(run)
    names = {"guidance_scale"} if "1,8" in words else set[str]()
    backbone = load_pipeline(run, "cpu").denoiser.backbone
    assert set(backbone.number_embeddings or ()) == names and SCALE == "guidance_scale"  # type: ignore[attr-defined]


def test_prior_pictures_of_a_teacher_are_none_of_its_student(taught: Path, latents: Path, tmp_path: Path) -> None:
    """A whole model may have been trained beside them."""
    teacher = Path(shutil.copytree(taught / "teacher", tmp_path / "teacher"))
    for path in (teacher / "config.json", teacher / "final" / "config.json"):
        values = json.loads(path.read_text())
        values["prior"] |= {"weight": 1.0, "captions": ["a red circle"]}
        path.write_text(json.dumps(values))
    run = students.student(teacher, latents, tmp_path / "run")
    assert json.loads((run / "config.json").read_text())["prior"]["weight"] == 0


def test_a_student_is_drawn_in_the_size_of_its_latents(
    taught: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Path(shutil.copytree(taught / "teacher", tmp_path / "teacher"))
    path = teacher / "final" / "config.json"
    values = json.loads(path.read_text())
    values["sample"]["size"] = [48, 48]
    path.write_text(json.dumps(values))
    assert students.distill(teacher, latents, "--dry-run") == 0
    assert "sample.size is 32x32, as these latents are, and 48x48 in the teacher" in capsys.readouterr().err


def test_averages_of_another_length_are_those_of_the_student(taught: Path, latents: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    words = ("--train.ema_lengths", "0.05,0.2", "--train.ema_every", 1, "--lr", "0.05", "--output", run)
    assert students.distill(taught / "teacher", latents, *words) == 0
    assert tiny.call("posthoc_ema", "--model", run, "--length", "0.1", "--output", other) == 0
    assert load_pipeline(other, "cpu").student.scales == (2.0,)
    told = json.loads((other / "teacher.json").read_text())
    assert told == json.loads((run / "final" / "teacher.json").read_text())
    drawn(other)


def test_a_stopped_student_goes_on_byte_for_byte(
    taught: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by its own config, which says what it has taken in."""
    words = ("--student.guidance_scale", "1,8", "--max-steps", 6, "--lr", "0.01", "--optimizer.warmup", 0)
    assert students.distill(taught / "teacher", latents, *words, "--output", tmp_path / "whole") == 0
    stop_at(monkeypatch, 3)
    assert students.distill(taught / "teacher", latents, *words, "--output", tmp_path / "run") == 143
    monkeypatch.undo()
    where = ("--output", tmp_path / "run", "--resume", "auto")
    assert students.distill(taught / "teacher", latents, *words, *where) == 0
    same(tmp_path / "run", tmp_path / "whole")
    own = ("--teacher", taught / "teacher", "--latents", latents, "--device", "cpu", *where)
    assert tiny.call("distill_denoiser", *own) == 0
    assert "no --config was given: the run's own is used" in capsys.readouterr().err


def test_the_command_of_its_page_gives_it_again(taught: Path, latents: Path, tmp_path: Path) -> None:
    """By its own config, baked scale and all."""
    words = ("--teacher", taught / "teacher", "--latents", latents, "--device", "cpu")
    config = taught / "baked" / "config.json"
    assert tiny.call("distill_denoiser", *words, "--config", config, "--output", tmp_path / "again") == 0
    ours, theirs = (load_tensors(run / "final" / "model.safetensors") for run in (tmp_path / "again", taught / "baked"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    page = (taught / "baked" / "report.html").read_text()
    assert "distill-denoiser --config RUN/config.json" in page and "--teacher TEACHER" in page
