"""The truth of stage two's training: the precision of what is kept, and whose weights are looked at."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from training import config as configs
from training.data import Latents
from training.loop import Loop
from training.order import Slot
from training.shards import ShardSet
from training.stage_two import DenoiserStage
from training.train import stage_two

SHAPE = {"backbone.width": "16", "backbone.depth": "1", "text.width": "16", "text.depth": "1"}


@pytest.fixture
def make(latents: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[DenoiserStage, Loop]]]:
    """A stage and its loop; overrides as `section__key="text"`. All stages of a process have the latest's precision."""

    def build(precision: str = "no", **changes: str) -> tuple[DenoiserStage, Loop]:
        overrides = {key.replace("__", "."): text for key, text in changes.items()}
        config = configs.load("denoiser", "smoke", {**SHAPE, "train.batch_size": "8", **overrides})
        assert isinstance(config, configs.DenoiserConfig)
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        train, val = (Latents(ShardSet(latents, split)) for split in ("train", "val"))
        args = Namespace(latents=latents, text_encoder=None, init_from=None)
        stage: DenoiserStage = stage_two(args, config, train, val, None, accelerator)[1]
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


def test_bf16_keeps_float32_weights(make: Callable[..., tuple[DenoiserStage, Loop]]) -> None:
    """The network computes in bf16; weights, gradients, moments and averages are float32, so that no update is lost."""
    found = {}
    for precision in ("no", "bf16"):
        stage, loop = make(precision)
        for number in range(3):
            before = weights(stage.network)
            assert step(stage, number)["loss"].dtype == torch.float32
            assert {gradient.dtype for gradient in gradients(stage.network)} == {torch.float32}
            if number == 2:
                found[precision] = torch.cat([gradient.flatten() for gradient in gradients(stage.network)])
            loop.step(number, 1e-5)
    assert 0 < (found["bf16"] - found["no"]).norm() < 0.1 * found["no"].norm()
    kept = loop.snapshot(3).tensors
    assert {t.dtype for group in kept.values() for t in group.values()} == {torch.float32} and all(kept.values())
    after = weights(stage.network)
    moved = (after != before) & (before.abs() > 0.1)  # where 1e-5 is far below the rounding of bf16
    assert moved.sum() > 100
    assert (after.bfloat16() == before.bfloat16())[moved].float().mean() > 0.9


def test_evaluation_sees_the_averages(
    make: Callable[..., tuple[DenoiserStage, Loop]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, loop = make()
    for number in range(2):
        step(stage, number)
        loop.step(number, 1e-3)
    live, seen = weights(stage.network), []
    monkeypatch.setattr(stage, "evaluate", lambda folder: seen.append(weights(stage.network)) or {"loss": 0.0})
    loop.look(2)
    averages = [loop.ema.shadow[f"denoiser.{key}"].flatten() for key, _ in stage.network.named_parameters()]
    assert torch.equal(seen[0], torch.cat(averages)) and not torch.allclose(seen[0], live, atol=1e-5)
    assert torch.equal(weights(stage.network), live)
