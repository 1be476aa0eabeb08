"""Steps of stage one on eight packed shapes: a stage, its loop, and what a step leaves in its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from autoencoder.alignment import VisionFeatures
from training.data.images import Images
from training.data.order import Slot
from training.data.samples import Batch
from training.loop.loop import Loop
from training.models.lpips import load_perceptual
from training.settings import decoding
from training.shards.reading import ShardSet
from training.stages.autoencoder import AutoencoderStage

SHAPE = {"model.channels": "8,8,8", "model.groups": "4", "discriminator.width": "4", "train.validation_size": "8"}
NETWORK: dict[str, Any] = {"channels": [8, 8, 8], "blocks": 1, "groups": 4, "mid_attention": False}
DEEP: dict[str, Any] = {"kind": "dc", "channels": [8, 8, 32], "latent_channels": 4, "attention_at": [4]}
DEEP |= {"encoder_blocks": [1, 1, 1], "decoder_blocks": [1, 1, 1]}
TIMES = {"loss.discriminator_start": "2", "loss.adversarial_start": "4", "loss.adversarial_ramp": "1"}


class Patches(torch.nn.Module):
    """A vision model of one strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 6, 4, 4)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.layer(pixel_values))


@pytest.fixture
def make(shapes: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[AutoencoderStage, Loop]]]:
    """A stage and its loop; overrides as `section__key="text"`. All stages of a process have the latest's precision."""

    def build(
        model: dict[str, Any] | None = None, precision: str = "no", **changes: str
    ) -> tuple[AutoencoderStage, Loop]:
        overrides = {**SHAPE, **TIMES, **{key.replace("__", "."): text for key, text in changes.items()}}
        config = decoding.load("autoencoder", "smoke", overrides)
        if model:
            values = decoding.to_values(config)
            config = decoding.decode("autoencoder", {**values, "model": model})
        assert isinstance(config, decoding.AutoencoderConfig)
        torch.manual_seed(0)
        wanted = config.loss.perceptual or config.discriminator.on_features
        perceptual = load_perceptual("squeeze", "random") if wanted else None
        network = config.model.build()
        discriminator = config.discriminator.build(perceptual.features if perceptual else None)
        images, held_out = Images(ShardSet(shapes, "train")), Images(ShardSet(shapes, "val"))
        vision = VisionFeatures(Patches(), 16, (0.5,) * 3, (0.5,) * 3) if config.loss.align else None
        stage = AutoencoderStage(config, network, discriminator, perceptual, images, held_out, vision)
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        return stage, Loop(stage, config.train, config.optimizer, accelerator, tmp_path / "run", 1, 8)

    yield build
    AcceleratorState._reset_state()


def step(stage: AutoencoderStage, loop: Loop, number: int, parts: int = 1) -> dict[str, Tensor]:
    """One gradient step on the same eight pictures, optionally in parts; gradients are left in place."""
    share, values = 8 // parts, {}
    for part in range(parts):
        values = stage.backward(pictures(stage, number, range(part * share, (part + 1) * share)), number, 1 / parts)
    stage.after_backward(number)
    return values


def pictures(stage: AutoencoderStage, number: int, places: range = range(8)) -> Batch:
    """Those of step `number`, which are the same in every step but for their noise."""
    return stage.dataset.__getitems__([Slot(i, 0, 8 * number + i) for i in places])


def gradients(module: torch.nn.Module) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in module.parameters()])


def weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])
