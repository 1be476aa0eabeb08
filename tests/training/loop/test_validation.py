"""Validation: in float32 whatever the training's precision, which goes on in its own afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import autoencoder_steps
import denoiser_steps
import pytest
import torch
from torch import nn

from training.loop.loop import Loop
from training.loop.stage import Stage
from training.loop.validation import validate
from training.loop.wrapping import unwrapped
from training.stages.autoencoder import AutoencoderStage

make_autoencoder, make_denoiser = autoencoder_steps.make, denoiser_steps.make
Make = Callable[..., tuple[Any, Loop]]


def numbers(stage: Stage, loop: Loop, folder: Path) -> dict[str, float]:
    return validate(stage, loop.ema, folder)[0]


def test_an_autoencoder_is_validated_in_float32(make_autoencoder: Make, tmp_path: Path) -> None:
    flags = {"loss__perceptual": "0", "loss__adversarial": "0"}
    expected = numbers(*make_autoencoder(**flags), tmp_path)
    stage, loop = make_autoencoder(precision="bf16", **flags)
    assert numbers(stage, loop, tmp_path) == expected
    with torch.no_grad():
        assert stage.evaluate(tmp_path) != expected  # what autocast tells of it


def test_a_denoiser_is_validated_in_float32(make_denoiser: Make, tmp_path: Path) -> None:
    flags = {"train__validation_size": "8", "train__ema": "0", "sample__steps": "1", "sample__size": "[32, 32]"}
    found = []
    for precision in ("no", "bf16"):
        stage, loop = make_denoiser(precision=precision, **flags)
        torch.manual_seed(0)
        for p in stage.network.parameters():  # whose last layer begins with zeros
            nn.init.normal_(p, std=0.2)
        found.append(numbers(stage, loop, tmp_path))
    expected = found[0]
    assert found[1] == expected
    with torch.no_grad():
        assert stage.evaluate(tmp_path) != expected


def test_training_goes_on_in_its_precision(make_autoencoder: Make) -> None:
    """The wrapper stands again after a validation, one that failed too."""
    stage, _ = make_autoencoder(precision="bf16", loss__adversarial="0")
    assert isinstance(stage, AutoencoderStage)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    before = stage.model(images, None)[0]
    with pytest.raises(ZeroDivisionError), unwrapped(stage):
        assert not torch.equal(stage.model(images, None)[0], before)
        raise ZeroDivisionError
    assert torch.equal(stage.model(images, None)[0], before)
