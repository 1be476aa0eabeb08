"""A tiny autoencoder taught by a trained one: through the door, resumed, held to its teacher, and drawn with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from PIL import Image

from autoencoder.fidelity import psnr
from autoencoder.images import to_uint8, to_unit
from autoencoder.tiny import Tiny
from ldm.noise import Noise
from training.data.images import Images
from training.data.order import Slot
from training.loop.loop import Loop
from training.models.assembly import load_pipeline
from training.models.autoencoders import load_autoencoder
from training.models.lpips import load_perceptual
from training.pictures import grids
from training.settings import decoding
from training.shards.reading import ShardSet
from training.stages.preview import DistillationStage

SMALL = ["--config", "tiny", "--model.width", "8", "--lr", "3e-3", "--optimizer.warmup", "0"]
SMALL += ["--num-workers", "0", *tiny.SHORT]


def distil(teacher: Path | None, data: Path, run: Path, *words: object) -> tuple[object, ...]:
    given = ("--teacher", teacher) if teacher else ()
    return (*given, "--data", data, "--output", run, *SMALL, *words)


@pytest.fixture(scope="module")
def student(shapes: Path, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of distillation, with LPIPS."""
    run = tmp_path_factory.mktemp("student") / "run"
    lpips = ("--loss.perceptual", 0.1, "--loss.perceptual_net", "squeeze", "--loss.perceptual_weights", "random")
    assert tiny.call("train_autoencoder", *distil(autoencoder, shapes, run, *lpips)) == 0
    return run


def test_through_the_door(student: Path, autoencoder: Path, shapes: Path) -> None:
    """The shape is the teacher's, what is learned is the teacher's, and the run is an autoencoder like any other."""
    model, teacher = load_autoencoder(student), load_autoencoder(autoencoder)
    assert (model.factor, model.latent_channels) == (teacher.factor, teacher.latent_channels) == (4, 4)
    assert not model.norm.shift.any() and (model.norm.scale == 1).all()
    values = [row for row in tiny.rows(student) if "loss" in row]
    for row in values:
        assert row["loss"] == pytest.approx(row["pictures"] + row["latents"] + row["perceptual"], rel=1e-5)
    assert values[-1]["loss"] < values[0]["loss"]
    looks = [row for row in tiny.rows(student) if "val/latents" in row]
    assert [row["step"] for row in looks] == [0, 4, 6] and looks[-1]["val/latents"] < looks[0]["val/latents"]
    assert {"val/teacher_psnr", "val/teacher_ssim", "val/teacher_lpips"} <= looks[0].keys()
    assert (student / "samples" / "final" / "grid.png").is_file()
    record, own = (json.loads((run / "run.json").read_text()) for run in (student, autoencoder))
    assert record["teacher"] == {"autoencoder": own["hashes"]["autoencoder"]}
    assert own["teacher"] == {"autoencoder": "none"}
    assert json.loads((student / "final" / "teacher.json").read_text()) == record["teacher"]


def test_the_numbers_are_those_beside_the_teachers_pictures(student: Path, autoencoder: Path, shapes: Path) -> None:
    model, teacher = load_autoencoder(student), load_autoencoder(autoencoder)
    held_out = Images(ShardSet(shapes, "val"))
    images = to_unit(held_out.__getitems__([Slot(i, 0, i) for i in held_out.evenly(8)]).data)
    latents = teacher.norm.mean_latents(teacher.encode(images))
    wanted = psnr(to_uint8(model.decode(latents)), to_uint8(teacher.decode(latents))).mean().item()
    told = json.loads((student / "run.json").read_text())["validation"]
    assert told["teacher_psnr"] == pytest.approx(wanted, abs=1e-2)
    assert told["latents"] == pytest.approx((model.encode(images) - latents).square().mean().item(), rel=1e-3)


def test_its_run_serves_as_any_other(student: Path, shapes: Path, tmp_path: Path) -> None:
    words = ("--data", shapes, "--output", tmp_path / "latents", "--device", "cpu")
    assert tiny.call("encode_latents", "--autoencoder", student, *words) == 0
    assert ShardSet(tmp_path / "latents").summary["latent"]["shape"] == [4, 8, 8]


def test_resume_is_exact_and_asks_for_the_same_teacher(
    autoencoder: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, broken, other = tmp_path / "straight", tmp_path / "broken", tmp_path / "other"
    schedule = ("--optimizer.decay", "constant", "--sample-every", 1)
    assert tiny.call("train_autoencoder", *distil(autoencoder, shapes, straight, "--max-steps", 3, *schedule)) == 0
    assert tiny.call("train_autoencoder", *distil(autoencoder, shapes, broken, "--max-steps", 2, *schedule)) == 0
    again = ("--max-steps", 3, *schedule, "--resume", "auto")
    flags = [*tiny.AUTOENCODER, "--max-steps", "1", "--seed", "9"]
    assert tiny.call("train_autoencoder", "--data", shapes, "--output", other, *flags) == 0
    problem = tiny.refused("train_autoencoder", *distil(other, shapes, broken, *again))
    ours = json.loads((broken / "run.json").read_text())["teacher"]["autoencoder"]
    assert problem.code == 4 and f"made with teacher autoencoder {ours[:12]}, now given" in problem.what
    alone = tiny.refused("train_autoencoder", *distil(None, shapes, broken, *again, "--config", broken / "config.json"))
    assert alone.code == 4 and "now given none" in alone.what
    assert tiny.call("train_autoencoder", *distil(autoencoder, shapes, broken, *again)) == 0
    assert "resumed from step 2" in capsys.readouterr().err
    assert tiny.last_checkpoint(broken) == tiny.last_checkpoint(straight)
    exported = [(run / "final" / "model.safetensors").read_bytes() for run in (straight, broken)]
    assert exported[0] == exported[1]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--model.latent_channels", "7"], 2, "factor 4 and 4 latent channels, the student 4 and 7"),
        (["--model.encoder_blocks", "1,1,1,1", "--model.decoder_blocks", "1,1,1,1"], 2, "the student 8 and 4"),
        (["--model.encoder_blocks", "1,1,1,1"], 2, "the blocks of the same levels"),
        (["--loss.adversarial", "0.5"], 2, "no adversary"),
        (["--loss.align", "0.5"], 2, "alignment"),
        (["--loss.return_margin", "1"], 2, "return"),
        (["--loss.log_variance", "learned"], 2, "log-variance"),
        (["--latent.kind", "equivariance"], 2, "latent regulariser"),
        (["--teacher", "nowhere"], 4, "no such run"),
    ],
)
def test_what_is_refused(
    autoencoder: Path, shapes: Path, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    problem = tiny.refused("train_autoencoder", *distil(autoencoder, shapes, tmp_path / "run", *words))
    assert problem.code == code and said in problem.what and problem.hint
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_unfinished_teacher_is_refused(autoencoder: Path, shapes: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(autoencoder, unfinished)
    shutil.rmtree(unfinished / "final")
    problem = tiny.refused("train_autoencoder", *distil(unfinished, shapes, tmp_path / "run"))
    assert problem.code == 4 and "not finished" in problem.what


def test_a_student_with_a_posterior_is_refused(autoencoder: Path, shapes: Path, tmp_path: Path) -> None:
    words = ("--teacher", autoencoder, "--data", shapes, "--output", tmp_path / "run", *tiny.AUTOENCODER)
    problem = tiny.refused("train_autoencoder", *words, "--loss.adversarial", 0)
    assert problem.code == 2 and "posterior or codes" in problem.what and "--config tiny" in problem.hint


def test_without_a_teacher_it_learns_latents_of_its_own(
    shapes: Path, tmp_path: Path, denoiser: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert tiny.call("train_autoencoder", *distil(None, shapes, run, "--max-steps", 1)) == 0
    assert "latents of its own" in capsys.readouterr().err
    assert load_autoencoder(run).norm.shift.any()
    words = ("--model", denoiser, "--output", tmp_path / "out", "--device", "cpu", "--prompt", "x", "--preview", run)
    problem = tiny.refused("generate", *words)
    assert problem.code == 4 and "was not distilled" in problem.what and "--teacher" in problem.hint


def stage(shapes: Path, autoencoder: Path, folder: Path) -> tuple[DistillationStage, Loop]:
    overrides = {"loss.perceptual": "0.5", "loss.reconstruction": "l1", "train.num_workers": "0"}
    settings: Any = decoding.load("autoencoder", "tiny", overrides)
    torch.manual_seed(0)
    model = Tiny(width=8).fit_to(4, 4).build()
    images = Images(ShardSet(shapes, "train"))
    made = DistillationStage(
        settings, model, load_autoencoder(autoencoder), load_perceptual("squeeze", "random"), images, images
    )
    return made, Loop(made, settings.train, settings.optimizer, Accelerator(cpu=True), folder, 1, 8)


def test_the_split_of_the_batch_does_not_matter(shapes: Path, autoencoder: Path, tmp_path: Path) -> None:
    """One micro-batch or two: the same gradients; none reaches the teacher or the feature network."""
    found = []
    for parts in (1, 2):
        one, _ = stage(shapes, autoencoder, tmp_path / str(parts))
        for part in range(parts):
            size = 8 // parts
            slots = [Slot(i, 0, i) for i in range(part * size, (part + 1) * size)]
            one.backward(one.dataset.__getitems__(slots), 3, 1 / parts)
        found.append(torch.cat([p.grad.flatten() for p in one.model.parameters() if p.grad is not None]))
        assert one.perceptual and all(p.grad is None for p in (*one.teacher.parameters(), *one.perceptual.parameters()))
    assert len(found[0]) == sum(p.numel() for p in one.model.parameters())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_the_loss_and_its_grid_by_hand(shapes: Path, autoencoder: Path, tmp_path: Path) -> None:
    """mean |D_s(z) - D_t(z)| + mean (E_s(x) - z̄)² + 0.5 LPIPS, z drawn by (seed, step, slot); told in parts.

    The grid shows the input, the teacher's picture, the student's, and twice the difference of the last two.
    """
    one, _ = stage(shapes, autoencoder, tmp_path / "run")
    batch = one.dataset.__getitems__([Slot(i, 0, 24 + i) for i in range(8)])
    images, moments = to_unit(batch.data), one.teacher.encode(to_unit(batch.data))
    noise = Noise(24 + torch.arange(8)).normal((4, 8, 8), one.config.train.seed, 3, "posterior")
    with torch.no_grad():
        z, mean = one.teacher.norm.latents(moments, noise), one.teacher.norm.mean_latents(moments)
        ours, theirs = one.model.decode(z), one.teacher.decode(z)
        assert one.perceptual is not None
        wanted = {
            "pictures": (ours - theirs).abs().mean().item(),
            "latents": (one.model.norm.mean_latents(one.model.encode(images)) - mean).square().mean().item(),
            "perceptual": 0.5 * one.perceptual(ours, theirs).mean().item(),
        }
        with torch.enable_grad():
            told = one.backward(batch, 3, 1.0)
        found = {name: value.item() for name, value in told.items()}
        assert found == pytest.approx({"loss": sum(wanted.values()), **wanted}, rel=1e-4)
        numbers = one.evaluate(tmp_path)
        pixels = one.held_out.__getitems__([Slot(i, 0, i) for i in range(8)]).data
        latents = one.teacher.norm.mean_latents(one.teacher.encode(to_unit(pixels)))
        rows = {"input": pixels, "teacher": one.teacher.decode(latents), "student": one.model.decode(latents)}
    sheet = grids.comparison({n: p if n == "input" else to_uint8(p) for n, p in rows.items()})
    difference = np.asarray(sheet).astype(int) - np.asarray(Image.open(tmp_path / "grid.png"))
    assert np.abs(difference).max() <= 4 and numbers["teacher_psnr"] > 0  # of a batch of 64, rounded otherwise


@pytest.fixture(scope="module")
def preview(denoiser: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distilled from the copy of the autoencoder that the denoiser carries; only final/ of it."""
    run = tmp_path_factory.mktemp("preview")
    words = distil(denoiser / "final" / "autoencoder", shapes, run / "run")
    assert tiny.call("train_autoencoder", *words) == 0
    return Path(shutil.copytree(run / "run" / "final", run / "final"))


def test_pictures_are_decoded_by_the_preview(
    denoiser: Path, preview: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same latents, with tiles too; a picture says so, and is made again with the same preview alone."""
    pipeline, full = (load_pipeline(denoiser, "cpu", preview=path) for path in (preview, None))
    model, latents = load_autoencoder(preview), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(pipeline.decode(latents), model.decode(latents))
        assert not torch.equal(full.decode(latents), model.decode(latents))
    words = ("--model", denoiser, "--device", "cpu", "--seed", 3)
    asked = ("--prompt", "a red circle", "--steps", 2)
    assert tiny.call("generate", *words, *asked, "--output", tmp_path / "made", "--preview", preview) == 0
    made = tmp_path / "made" / "00000.png"
    drawn = np.asarray(pipeline(["a red circle"], 3, sampling=pipeline.sampling)[0]).astype(int)
    assert np.abs(drawn - np.asarray(Image.open(made)).astype(int)).max() <= 1
    facts, hashes = grids.facts(made), json.loads((preview / "config.json").read_text())
    assert hashes["model"]["kind"] == "tiny" and facts["preview"] == facts["hashes"]["autoencoder"]
    again = (*words[:4], "--like", made, "--output")
    plain = tiny.refused("generate", *again, tmp_path / "no")
    assert plain.code == 4 and "this is no preview" in plain.what and "--preview" in plain.hint
    assert tiny.call("generate", *again, tmp_path / "again", "--preview", preview) == 0
    assert "the same pixels as" in capsys.readouterr().err
    assert tiny.call("generate", *words, *asked, "--output", tmp_path / "full") == 0
    assert grids.facts(tmp_path / "full" / "00000.png")["preview"] is None
    like = ("--like", tmp_path / "full" / "00000.png", "--output", tmp_path / "no", "--preview", preview)
    assert "leave --preview out" in tiny.refused("generate", *words[:4], *like).hint


def test_a_preview_of_another_autoencoder_is_refused(
    denoiser: Path, preview: Path, tmp_path: Path, autoencoder: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(preview, other)
    (other / "teacher.json").write_text(json.dumps({"autoencoder": "0" * 64}))
    words = ("--model", denoiser, "--output", tmp_path / "out", "--device", "cpu", "--prompt", "x", "--preview")
    problem = tiny.refused("generate", *words, other)
    assert problem.code == 4 and "distilled from autoencoder 000000000000, the denoiser's is" in problem.what
    plain = tiny.refused("generate", *words, autoencoder)
    assert plain.code == 4 and "was not distilled" in plain.what
