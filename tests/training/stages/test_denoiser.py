"""The truth of stage two's training: the precision of what is kept, and whose weights are looked at."""

from __future__ import annotations

from collections.abc import Callable

import denoiser_steps
import pytest
import torch
from denoiser_steps import gradients, step, weights

from ldm.objectives import OBJECTIVES, Denoising, DenoisingConfig
from training.loop.loop import Loop
from training.stages.denoiser import DenoiserStage

make = denoiser_steps.make


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
    loop.validate(2)
    averages = [loop.ema.shadow[f"denoiser.{key}"].flatten() for key, _ in stage.network.named_parameters()]
    assert torch.equal(seen[0], torch.cat(averages)) and not torch.allclose(seen[0], live, atol=1e-5)
    assert torch.equal(weights(stage.network), live)


def test_the_objective_is_what_the_config_names(make: Callable[..., tuple[DenoiserStage, Loop]]) -> None:
    """By its kind, on the config's own process: an objective that is one module more needs no line of the stage."""
    stage, _ = make()
    (kind,) = [objective for objective in OBJECTIVES if objective().kind == stage.config.objective.kind]
    assert kind is DenoisingConfig and isinstance(stage.objective, Denoising)
    objective, config = stage.objective, stage.config
    assert objective.diffusion.schedule == config.schedule and objective.diffusion.prediction == config.prediction
    assert (objective.times, objective.weighting) == (config.times, config.weighting)
    assert objective.pairing == config.pairing
