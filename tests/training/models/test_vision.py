"""Stage one aligned with a Hugging Face vision model: real folders, the run's lineage, its resume, clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from autoencoder.alignment import VisionFeatures
from training.drills.verify_resume import differences
from training.errors import UserError
from training.loop.loop import Loop
from training.models.judge import Classifier
from training.models.vision import load_features, load_vision
from training.tensors import save_tensors

FLAGS = [*tiny.AUTOENCODER, "--loss.perceptual", "0", "--loss.align", "0.5", "--max-steps", "4"]


def dinov2(folder: Path, seed: int = 0) -> Path:
    """A tiny DINOv2 for pictures of 28 pixels, in patches of 7, as its folder on disk."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**shape, image_size=28, patch_size=7)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dinov2(tmp_path_factory.mktemp("dinov2"))


def test_half_precision_is_loaded_as_float32(model: Path, tmp_path: Path) -> None:
    Dinov2Model.from_pretrained(model).half().save_pretrained(tmp_path)
    BitImageProcessor.from_pretrained(model).save_pretrained(tmp_path)
    assert {p.dtype for p in load_vision(str(tmp_path)).parameters()} == {torch.float32}


def test_a_dinov2_folder(model: Path) -> None:
    """Its patch tokens, at the crop's size, normalised as its preprocessor says."""
    vision = load_vision(str(model))
    assert (vision.size, vision.width) == (28, 16) and not any(p.requires_grad for p in vision.parameters())
    processor = BitImageProcessor.from_pretrained(model)
    images = torch.rand(2, 3, 28, 28) * 2 - 1
    normal = ((images + 1) / 2 - torch.tensor(processor.image_mean).view(3, 1, 1)) / torch.tensor(
        processor.image_std
    ).view(3, 1, 1)
    tokens = Dinov2Model.from_pretrained(model).eval()(pixel_values=normal).last_hidden_state
    assert tokens.shape == (2, 17, 16)
    expected = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(vision(images, (4, 4)), expected)


def test_a_classifier_stands_for_a_vision_model(model: Path, tmp_path: Path) -> None:
    """Told by its folder: its maps on the grid asked for."""
    network = Classifier(("a", "b"), 2).eval()
    save_tensors(tmp_path / "model.safetensors", network.state_dict())
    (tmp_path / "config.json").write_text('{"classes": ["a", "b"], "width": 2}')
    found, images = load_features(str(tmp_path)), torch.rand(2, 1, 16, 24) * 2 - 1
    assert found.width == 8 and not any(p.requires_grad for p in found.parameters())
    torch.testing.assert_close(found(images, (4, 6)), network.places(images))
    assert isinstance(load_features(str(model)), VisionFeatures)


def test_the_image_half_of_a_clip_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    half: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**half, "vocab_size": 32, "max_position_embeddings": 8}
    config = CLIPConfig(vision_config={**half, "image_size": 16, "patch_size": 4}, text_config=text)
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(tmp_path)
    vision = load_vision(str(tmp_path))
    assert (vision.size, vision.width) == (16, 8)
    assert vision(torch.zeros(1, 3, 32, 32), (8, 8)).shape == (1, 8, 8, 8)


def test_a_run_learns_with_it_and_resumes_exactly(
    shapes: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--data", shapes, "--align-with", model, "--train.log_every", 1, "--resume", "auto", *FLAGS)
    assert tiny.call("train_autoencoder", *words, "--output", tmp_path / "straight") == 0
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_poll_signals", lambda self: 15 * (self.done == 2))
        assert tiny.call("train_autoencoder", *words, "--output", tmp_path / "stopped") == 143
    assert tiny.call("train_autoencoder", *words, "--output", tmp_path / "stopped") == 0
    assert differences(tmp_path / "straight", tmp_path / "stopped") == []
    told = [row["alignment"] for row in tiny.rows(tmp_path / "straight") if "alignment" in row]
    assert len(told) == 4 and all(value > 0 for value in told)
    checkpoints = tmp_path / "stopped" / "checkpoints"
    first, last = (load_file(checkpoints / f"step-0000000{n}" / "model.safetensors") for n in (2, 4))
    key = "alignment.projection.weight"
    assert first[key].shape == (16, 4, 1, 1) and not torch.equal(first[key], last[key])
    assert not any("network" in name for name in last)  # the vision model is not the run's
    assert not any("projection" in name for name in load_file(tmp_path / "straight" / "final" / "model.safetensors"))
    other = tiny.refused("train_autoencoder", *words[:2], "--align-with", dinov2(tmp_path / "other", 1), *words[4:],
                         "--max-steps", 5, "--output", tmp_path / "stopped")  # fmt: skip
    assert other.code == 4 and "made with vision weights" in other.what


def test_two_processes_train_as_one(shapes: Path, model: Path, tmp_path: Path) -> None:
    """With a vision model of adaptive weight and a critic on features: each loss of each step within rounding."""
    words = ["--data", shapes, "--align-with", model, "--train.log_every", "1", "--lr", "1e-4", *FLAGS]
    words += ["--discriminator.kind", "features", "--loss.align_adaptive", "true"]
    assert tiny.call("train_autoencoder", *words, "--output", tmp_path / "one") == 0
    together = ranks.start(2, tmp_path, "train_autoencoder", *words, "--output", tmp_path / "two")
    assert together == [0, 0], ranks.said(tmp_path)
    for ours, theirs in zip(*(tiny.rows(tmp_path / name) for name in ("one", "two")), strict=True):
        for name in ("loss", "alignment", "align_balance", "discriminator"):
            assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=1e-4), (ours["step"], name)
    assert all(row["align_balance"] > 0 for row in tiny.rows(tmp_path / "two") if row.get("alignment"))


def test_what_is_missing_or_wrong_is_told(shapes: Path, model: Path, tmp_path: Path) -> None:
    alone = tiny.refused("train_autoencoder", "--data", shapes, "--output", tmp_path / "run", *FLAGS)
    assert alone.code == 2 and "loss.align 0.5 needs a vision model" in alone.what
    words = ("--data", shapes, "--output", tmp_path / "run", *FLAGS, "--align-with")
    idle = tiny.refused("train_autoencoder", *words, model, "--loss.align", "0")
    assert idle.code == 2 and "has no effect" in idle.what
    absent = tiny.refused("train_autoencoder", *words, tmp_path / "nowhere")
    assert absent.code == 3 and "no such folder of a vision model" in absent.what


@pytest.mark.parametrize(
    ("wrong", "says"),
    [("text", "a bert model is no"), ("weights", "lack"), ("preprocessor", "preprocessor"), ("empty", "config.json")],
)
def test_folders_that_do_not_serve(wrong: str, says: str, tmp_path: Path) -> None:
    if wrong == "text":
        BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
            tmp_path
        )
    elif wrong != "empty":
        dinov2(tmp_path)
    if wrong == "weights":
        config = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    if wrong == "preprocessor":
        (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=says) as caught:
        load_vision(str(tmp_path))
    assert caught.value.code == 3 and "preprocessor_config.json" in caught.value.hint
