"""What a step that is not taken leaves behind; verdicts read late, as on a GPU, for which the host does not wait."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import autoencoder_steps
import denoiser_steps
import pytest
import torch
from torch import Tensor
from whole_steps import everything, skipped_leaves_all_as_it_was, take

from training.errors import UserError
from training.loop.loop import Loop

make_autoencoder, make_denoiser = autoencoder_steps.make, denoiser_steps.make
Make = Callable[..., tuple[Any, Loop]]
VQ = {**autoencoder_steps.NETWORK, "kind": "vq", "codes": 16, "codebook_decay": 0.9, "revive_every": 3}
CHOICES: dict[str, dict[str, Any]] = {
    "adversary": {"loss__lecam": "0.1", "discriminator__norm": "batch"},
    "codes": {"model": VQ, "loss__perceptual": "0"},
    "plateau": {"loss__plateau": "0.5", "loss__plateau_steps": "2"},
    "alignment": {"loss__align": "1", "loss__align_adaptive": "true"},
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_skipped_step_of_an_autoencoder_moves_nothing(name: str, make_autoencoder: Make) -> None:
    """Weights, moments, averages and their counter, balance, anchors, codebook, plateau, the critic's statistics."""
    _, loop = make_autoencoder(train__spike_factor="2", train__ema_lengths="[0.1]", **CHOICES[name])
    skipped_leaves_all_as_it_was(loop, 5)


def test_a_skipped_step_of_a_denoiser_moves_nothing(make_denoiser: Make) -> None:
    """What loss-aware times have seen, too."""
    _, loop = make_denoiser(train__spike_factor="2", times__kind="loss-aware", times__bins="4")
    skipped_leaves_all_as_it_was(loop, 3)


def test_late_verdicts_change_no_bit(make_autoencoder: Make) -> None:
    found = []
    for waits in (True, False):
        _, loop = make_autoencoder()
        loop.waits = waits
        for step in range(5):
            take(loop, step)
        loop.settle()
        found.append(everything(loop, 5))
    assert found[0][1] == found[1][1]
    for key, value in found[0][0].items():
        assert torch.equal(found[1][0][key], value), key


def poison(loop: Loop, what: str) -> None:
    """Make the loss, or a gradient, of the step whose gradients are there NaN."""
    if what == "loss":
        loop.passes.losses[0] = torch.tensor(torch.nan)
    else:
        loop.stage.model.last_layer.grad[0, 0, 0, 0] = torch.nan  # type: ignore[attr-defined]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_late_verdict_stops_before_the_weights(what: str, make_autoencoder: Make, tmp_path: Path) -> None:
    """No weight or moment moves from the step on that is to blame; it is named when the verdict is read; the log ends
    before it."""
    stage, loop = make_autoencoder(loss__adversarial="0", train__log_every="1000", train__ema="0")
    loop.waits = False
    for step in range(5):
        values = loop.gradients(step)
        if step == 2:
            kept = everything(loop, 2)[0]
            poison(loop, what)
        loop.journal.record(step + 1, values | loop.step(step, 1e-3), 1e-3)
        loop.done = step + 1
    after = everything(loop, 2)[0]
    for key, value in kept.items():
        assert torch.equal(after[key], value) or key.startswith("ema/"), key
    said = {"loss": "loss is not finite at step 2", "gradient": "grad_norm of the autoencoder is not finite at step 2"}
    with pytest.raises(UserError, match=said[what]) as caught:
        loop.save(5, wait=True)
    assert caught.value.code == 5 and loop.done == 2
    run = tmp_path / "run"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    blamed = json.loads((run / "stopped-at-step-00000002.json").read_text())["samples"]
    assert blamed == [stage.dataset.shards.key(slot.index) for slot in loop.passes.batches.share(2, 0, 0)]
    assert not list((run / "checkpoints").glob("*"))


def test_nothing_is_read_from_the_device_in_a_step(make_autoencoder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a verdict is read late: each value read would be a wait for the GPU."""
    _, loop = make_autoencoder(loss__lecam="0.1")
    loop.waits = False
    read: list[str] = []

    def told(name: str, kept: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *words, **named: read.append(name) or kept(self, *words, **named)

    for step in range(5):
        loop.gradients(step)
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
                patch.setattr(Tensor, name, told(name, getattr(Tensor, name)))
            loop.step(step, 1e-3)
        assert read == []
    loop.settle()
