"""Diffusion in pixels, as a user comes to it: an identity autoencoder at once, then everything as ever."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from autoencoder.identity import Identity
from autoencoder.images import to_uint8
from training.data.images import Images
from training.data.latents import Latents
from training.models.assembly import load_pipeline
from training.models.autoencoders import autoencoder_hashes
from training.shards.reading import ShardSet

RUN = ["--config", "identity", "--device", "cpu"]


def test_the_run_is_finished_and_exact(grey: Path) -> None:
    record = json.loads((grey / "pixels" / "run.json").read_text())
    assert record["status"] == "finished" and not (grey / "pixels" / "checkpoints").exists()
    assert record["validation"] == {"psnr": None, "psnr_is": "inf", "ssim": 1.0}
    assert (grey / "pixels" / "samples" / "final" / "grid.png").is_file()


def test_its_hashes_stay() -> None:
    """Latents that were encoded once are those of every identity; grey and RGB have their own whole."""
    grey, hashes = autoencoder_hashes(Identity(image_channels=1).build()), autoencoder_hashes(Identity().build())
    assert hashes == autoencoder_hashes(Identity().build())
    assert hashes["encoder"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" == grey["encoder"]
    assert hashes["autoencoder"] != grey["autoencoder"]


def test_it_says_what_it_does(grey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one sentence; again, that it is complete; and which settings nothing reads."""
    words = [*RUN, "--data", grey / "data", "--output", tmp_path / "run"]
    assert tiny.call("train_autoencoder", *words, "--lr", 0.1, "--max-steps", 7) == 0
    told = capsys.readouterr()
    assert "nothing to train, the pixels are the latents: factor 1, 1 channels" in told.out + told.err
    assert "optimizer.lr: an identity autoencoder learns nothing" in told.out + told.err
    assert "train.max_steps: an identity autoencoder learns nothing" in told.out + told.err
    assert tiny.call("train_autoencoder", *words, "--lr", 0.1, "--max-steps", 7, "--resume", "auto") == 0
    told = capsys.readouterr()
    assert "already complete" in told.out + told.err


def test_the_stored_latents_are_the_pictures(grey: Path) -> None:
    """float16 holds every 8-bit level; the normaliser was not measured."""
    latents, images = Latents(ShardSet(grey / "latents")), Images(ShardSet(grey / "data"))
    assert latents.shape == (1, 16, 16) and latents.dtype == np.float16 and len(latents) == len(images)
    for index in range(len(images)):
        stored = torch.from_numpy(latents.moments(index).astype(np.float32))
        assert torch.equal(to_uint8(stored), torch.tensor(images.picture(index)).permute(2, 0, 1))
    norm = load_pipeline(grey / "run", "cpu").autoencoder.norm
    assert norm.shift.tolist() == [[[[0.0]]]] and norm.scale.tolist() == [[[[1.0]]]]


def test_every_door_takes_it(grey: Path, tmp_path: Path) -> None:
    machine = ["--device", "cpu"]
    measure = ["--model", grey / "pixels", "--data", grey / "data", "--count", 0, "--output", tmp_path / "ae.json"]
    assert tiny.call("evaluate", *measure, *machine) == 0
    numbers = json.loads((tmp_path / "ae.json").read_text())
    assert numbers["psnr_is"] == "inf" and numbers["ssim"] == 1.0
    look = [grey / "pixels", "--data", grey / "data", "--output", tmp_path / "page"]
    assert tiny.call("inspect_autoencoder", *look, "--probe-steps", 1, "--probe-samples", 2, *machine) == 0
    page = json.loads((tmp_path / "page" / "inspection.json").read_text())
    assert page["equivariance_error"]["turned by a quarter"]["mean"] == 0 and page["kl"] is None
    draw = ["--model", grey / "run", "--prompt", "noise odd", "--output", tmp_path / "drawn", *machine]
    assert tiny.call("generate", *draw) == 0
    with Image.open(next((tmp_path / "drawn").glob("*.png"))) as picture:
        assert picture.mode == "L" and picture.size == (16, 16)


@pytest.mark.parametrize("flag", ["--teacher", "--align-with", "--init-from"])
def test_there_is_nothing_to_learn_from(flag: str, grey: Path, tmp_path: Path) -> None:
    words = [*RUN, "--data", grey / "data", "--output", tmp_path / "run", flag, grey / "pixels"]
    assert f"{flag}: an identity autoencoder has no weights" in str(tiny.refused("train_autoencoder", *words))
    assert not (tmp_path / "run").exists()
