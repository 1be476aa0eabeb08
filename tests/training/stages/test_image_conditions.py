"""Training by image conditions: what a step shows the backbone, whatever the split; runs begun, widened and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import tiny
import torch
from denoiser_steps import gradients, make, step, weights
from stopped import same, stop_at
from torch import Tensor

from ldm.conditioning import Cond
from training.data.order import Slot
from training.loop.loop import Loop
from training.models.assembly import load_pipeline
from training.stages.denoiser import DenoiserStage
from training.stages.denoiser_job import UNREAD
from training.tensors import load_tensors

__all__ = ["make"]
Make = Callable[..., tuple[DenoiserStage, Loop]]
MASKED = {"image__kind": "masked"}


def seen(stage: DenoiserStage) -> list[Cond]:
    """What the backbone is shown from here on."""
    shown: list[Cond] = []
    stage.network.backbone.register_forward_pre_hook(lambda module, args: shown.append(args[2]))
    return shown


def image(stage: DenoiserStage, number: int, places: range = range(8)) -> Tensor:
    """Of the batch at a step, in micro-batches of two."""
    shown = seen(stage)
    for i in places[::2]:
        batch = stage.dataset.__getitems__([Slot(j, 0, 8 * number + j) for j in (i, i + 1)])
        stage.backward(batch, number, 0.25)
    return torch.cat([cond.extras["image"] for cond in shown])


def test_images_go_by_seed_step_and_slot(make: Make) -> None:
    whole, _ = make(**MASKED)
    shown = seen(whole)
    step(whole, 3)
    (cond,) = shown
    channels = whole.norm.scale.numel() + 1
    assert cond.extras["image"].shape[:2] == (8, channels)
    assert whole.network.backbone.get_parameter("patch_embedding.weight").shape[1] == 4 * (2 * channels - 1)
    parts, _ = make(**MASKED)
    assert torch.equal(image(parts, 3), cond.extras["image"])
    assert torch.equal(image(parts, 3, range(4, 8)), cond.extras["image"][4:])
    assert not torch.equal(image(parts, 4), cond.extras["image"])


def test_a_mask_condition_learns_and_the_rest_of_a_step_is_as_it_was(make: Make) -> None:
    plain, _ = make()
    masked, _ = make(**MASKED)
    losses = step(plain, 0)["loss"], step(masked, 0)["loss"]
    assert torch.equal(*losses) and len(weights(masked.network)) > len(weights(plain.network))
    assert len(gradients(masked.network)) == len(gradients(plain.network))


def test_validation_meets_the_same_masks_every_time(make: Make) -> None:
    stage, _ = make(**MASKED)
    assert stage.losses_of(stage.held_out.chunks([0, 1, 2], 2)) == stage.losses_of(stage.held_out.chunks([0, 1, 2], 2))


def test_what_is_not_stored_is_refused_before_the_first_step(latents: Path, tmp_path: Path) -> None:
    words = ("--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER, "--image.kind")
    for kind, flag in (("low-res", "--low-res"), ("source", "--encode-hint"), ("hint", "--hint")):
        problem = tiny.refused("train_denoiser", *words, kind)
        assert problem.code == 3 and "extra-image.npy" in problem.what and flag in problem.hint


def test_begun_from_a_run_without_image_it_is_widened_with_zeros(
    latents: Path, denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["--latents", latents, "--output", run, *tiny.DENOISER, "--image.kind", "masked", "--init-from", denoiser]
    assert tiny.call("train_denoiser", *words, "--lr", "1e-30") == 0
    own = load_tensors(run / "final" / "model.safetensors")
    theirs = load_tensors(denoiser / "final" / "model.safetensors")
    name = "patch_embedding.weight"
    channels = theirs[name].shape[1] // 4
    assert f"input widened by {channels + 1} channels for the image, zero at first" in capsys.readouterr().err
    assert torch.equal(own[name][:, : 4 * channels], theirs[name])
    assert own[name].shape[1] == 4 * (2 * channels + 1) and own[name][:, 4 * channels :].abs().max() < 1e-20
    pipeline = load_pipeline(run, "cpu")
    assert pipeline.denoiser.backbone.image_channels == channels + 1  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def straight(
    request: pytest.FixtureRequest, shapes: Path, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[object], Path]:
    """The words of a training by the kind of image condition that is asked for, and their run, not interrupted."""
    root, kind = tmp_path_factory.mktemp("straight"), request.param
    if kind == "hint":
        packing = "pack shapes --samples 96 --val-fraction 0.2 --samples-per-shard 40 --hint edges"
        assert tiny.call("make_shards", *packing.split(), "--output", root / "shapes") == 0
    data, also = (root / "shapes", []) if kind == "hint" else (shapes, ["--low-res", 4] if kind == "low-res" else [])
    given = ["--autoencoder", autoencoder, "--data", data, "--output", root / "latents", "--device", "cpu"]
    assert tiny.call("encode_latents", *given, *also) == 0
    words: list[object] = ["train_denoiser", "--latents", root / "latents", *tiny.DENOISER, "--image.kind", kind]
    assert tiny.call(*words, "--output", root / "run") == 0  # type: ignore[arg-type]
    return words, root / "run"


@pytest.mark.parametrize("straight", ["masked", "hint"], indirect=True)
def test_a_stopped_run_goes_on_byte_for_byte(
    straight: tuple[list[object], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (script, *words), whole = straight
    stop_at(monkeypatch, 3)
    assert tiny.call(str(script), *words, "--output", tmp_path / "run") == 143
    monkeypatch.undo()
    assert tiny.call(str(script), *words, "--output", tmp_path / "run", "--resume", "auto") == 0
    same(tmp_path / "run", whole)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("straight", ["masked", "hint", "low-res"], indirect=True)
def test_two_processes_train_as_one(straight: tuple[list[object], Path], tmp_path: Path) -> None:
    words, whole = straight
    assert ranks.start(2, tmp_path, *words, "--output", tmp_path / "run") == [0, 0], ranks.said(tmp_path)
    for ours, theirs in zip(tiny.rows(tmp_path / "run"), tiny.rows(whole), strict=True):
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-5)
    before = load_tensors(whole / "final" / "model.safetensors")
    for name, weight in load_tensors(tmp_path / "run" / "final" / "model.safetensors").items():
        torch.testing.assert_close(weight, before[name], rtol=1e-3, atol=1e-4)


def test_images_that_nothing_reads_are_told(
    upscaler: Path, autoencoder: Path, denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the start, a dry run's too, and in the books; with the words that have them read, which work."""
    hinted, small = tmp_path / "latents", upscaler.parent / "latents"
    pack = ("pack", "shapes", "--samples", 24, "--val-fraction", 0.3, "--hint", "edges", "--output", tmp_path / "data")
    assert tiny.call("make_shards", *pack) == 0
    encode = ("--autoencoder", autoencoder, "--data", tmp_path / "data", "--output", hinted, "--device", "cpu")
    assert tiny.call("encode_latents", *encode) == 0

    def told(latents: Path, *words: object) -> list[str]:
        capsys.readouterr()
        assert tiny.call("train_denoiser", "--latents", latents, *words, "--batch-size", 8) == 0
        lines = capsys.readouterr().err.splitlines()
        return [line.removeprefix(f"note: {UNREAD}: ") for line in lines if line.startswith(f"note: {UNREAD}")]

    upon = ("--base", denoiser, "--config", "lora", "--dry-run", "--device", "cpu")
    shape = "--image.kind low-res --image.factor 4"
    assert told(small, *tiny.DENOISER, "--dry-run") == [f"{shape} has them read"]
    assert told(small, *tiny.DENOISER, "--dry-run", *shape.split()) == []
    assert told(small, *upon) == ["a --base of image.kind low-res has them read"]
    assert told(hinted, *upon) == ["--config controlnet has them read"]
    assert told(hinted, *upon, "--config", "controlnet") == []
    own = "--image.kind hint"
    assert told(hinted, *tiny.DENOISER, "--image.kind", "masked", "--dry-run") == [f"{own} has them read"]
    short = (*tiny.DENOISER, "--max-steps", 1)
    assert told(hinted, *short, *own.split(), "--output", tmp_path / "hint") == []
    assert told(hinted, *short, "--output", tmp_path / "plain")
    books = json.loads((tmp_path / "plain" / "run.json").read_text())["ledger"]
    assert books["ignored"][UNREAD] == {"count": 1, "first": [f"{own} has them read"]}
