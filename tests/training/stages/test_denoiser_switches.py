"""What a config may switch on in stage two's training: the same model however a batch is split, and after a resume."""

from __future__ import annotations

from collections.abc import Callable

import denoiser_steps
import pytest
import torch
from denoiser_steps import gradients, step, weights

from ldm.backbones.routing import ROUTE
from training.data.order import Slot
from training.loop.loop import Loop
from training.stages.denoiser import DenoiserStage

make = denoiser_steps.make
Make = Callable[..., tuple[DenoiserStage, Loop]]
DEEP = {"backbone__depth": "3", "backbone__value_residual": "true", "backbone__route": "0.5"}
SWITCHES = {"routed": DEEP, "direction": {"objective__direction": "0.5"}}


def shake(stage: DenoiserStage) -> None:
    """No weight zero: every part has a gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in stage.network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_split_batch_gives_the_same_gradients(switch: str, make: Make) -> None:
    found = []
    for parts in (1, 4):
        stage, _ = make(**SWITCHES[switch])
        shake(stage)
        for part in range(parts):
            slots = [Slot(i, 0, 8 + i) for i in range(8)][part * 8 // parts :][: 8 // parts]
            stage.backward(stage.dataset.__getitems__(slots), 1, 1 / parts)
        found.append(gradients(stage.network))
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()) + 1e-7)


def test_tokens_pass_by_while_it_learns_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step by scores of the sample's own, other ones in the next step; in validations by none."""
    stage, _ = make(**DEEP)
    seen: list[torch.Tensor | None] = []
    predict = stage.network.backbone.predict
    monkeypatch.setattr(stage.network.backbone, "predict",
                        lambda x, level, cond: (seen.append(cond.extras.get(ROUTE)), predict(x, level, cond))[1])
    batch = stage.dataset.__getitems__([Slot(i, 0, 8 + i) for i in range(8)])
    for number in (1, 2):
        stage.backward(batch, number, 1.0)
    stage.backward(stage.dataset.__getitems__([Slot(i, 0, 8 + i) for i in (3, 2)]), 1, 1.0)
    first, second, again = seen
    assert first is not None and second is not None and again is not None
    assert first.shape == (8, 64 // stage.config.backbone.patch**2) and not torch.equal(first, second)
    assert torch.equal(again, first[[3, 2]])
    seen.clear()
    stage.losses_of(stage.held_out.chunks([0, 1], 2))
    assert seen and not any(scores is not None for scores in seen)


def test_coupled_groups_are_told_to_the_loop(make: Make) -> None:
    assert make()[0].group == 1 and make(objective__contrastive="0.05")[0].group == 8


def test_muon_goes_on_exactly(make: Make) -> None:
    """From a snapshot after two steps, as from no stop at all."""
    choices = {"optimizer__matrices": "muon", "backbone__width": "32", "text__width": "32"}
    (stage, loop), (again, fresh) = make(**choices), make(**choices)
    shake(stage)
    for number in range(4):
        if number == 2:
            checkpoint = loop.snapshot(2)
            assert any(key.endswith(".momentum") for key in checkpoint.tensors["optimizer"])
            fresh.restore(checkpoint)
        for part, its in ((stage, loop), (again, fresh)):
            if part is stage or number >= 2:
                step(part, number)
                its.step(number, 1e-2)
    assert torch.equal(weights(stage.network), weights(again.network))
