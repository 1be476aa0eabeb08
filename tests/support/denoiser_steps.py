"""Steps of stage two on eight encoded shapes: a stage, its loop, and what a step leaves in its gradients."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from training.data.latents import Latents
from training.data.order import Slot
from training.loop.loop import Loop
from training.settings import decoding
from training.shards.reading import ShardSet
from training.stages.denoiser import DenoiserStage
from training.stages.denoiser_job import DenoiserJob

SHAPE = {"backbone.width": "16", "backbone.depth": "1", "text.width": "16", "text.depth": "1"}


@pytest.fixture
def make(latents: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[DenoiserStage, Loop]]]:
    """A stage and its loop; overrides as `section__key="text"`. All stages of a process have the latest's precision."""

    def build(precision: str = "no", **changes: str) -> tuple[DenoiserStage, Loop]:
        overrides = {key.replace("__", "."): text for key, text in changes.items()}
        config = decoding.load("denoiser", "smoke", {**SHAPE, "train.batch_size": "8", **overrides})
        assert isinstance(config, decoding.DenoiserConfig)
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        train, val = (Latents(ShardSet(latents, split)) for split in ("train", "val"))
        args = Namespace(latents=latents, text_encoder=None, init_from=None, new_words=False)
        job = DenoiserJob(args, config)
        job.dataset, job.held_out = train, val
        stage = job.build(accelerator, None)
        return stage, Loop(stage, config.train, config.optimizer, accelerator, tmp_path / "run", 1, 8)

    yield build
    AcceleratorState._reset_state()


def step(stage: DenoiserStage, number: int) -> dict[str, Tensor]:
    batch = stage.dataset.__getitems__([Slot(i, 0, 8 * number + i) for i in range(8)])
    values = stage.backward(batch, number, 1.0)
    stage.after_backward(number)
    return values


def weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def gradients(module: torch.nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]
