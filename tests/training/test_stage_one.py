"""The truth of stage one's training: who learns when, from what, and that the split of the batch does not matter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from training import config as configs
from training.data import Images
from training.loop import Loop
from training.order import Slot
from training.perceptual import load_perceptual
from training.shards import ShardSet
from training.stage_one import AutoencoderStage

SHAPE = {"model.channels": "8,8,8", "model.groups": "4", "discriminator.width": "4", "train.validation_size": "8"}
TIMES = {"loss.discriminator_start": "2", "loss.adversarial_start": "4", "loss.adversarial_ramp": "1"}


@pytest.fixture
def make(shapes: Path, tmp_path: Path) -> Callable[..., tuple[AutoencoderStage, Loop]]:
    """A stage and its loop; overrides as `section__key="text"`."""

    def build(**changes: str) -> tuple[AutoencoderStage, Loop]:
        overrides = {**SHAPE, **TIMES, **{key.replace("__", "."): text for key, text in changes.items()}}
        config = configs.load("autoencoder", "smoke", overrides)
        assert isinstance(config, configs.AutoencoderConfig)
        torch.manual_seed(0)
        model, discriminator = config.model.build(), config.discriminator.build()
        perceptual = load_perceptual("squeeze", "random") if config.loss.perceptual else None
        images, held_out = Images(ShardSet(shapes, "train")), Images(ShardSet(shapes, "val"))
        stage = AutoencoderStage(config, model, discriminator, perceptual, images, held_out)
        loop = Loop(stage, config.train, config.optimizer, Accelerator(cpu=True), tmp_path / "run", 1, 8)
        return stage, loop

    return build


def step(stage: AutoencoderStage, loop: Loop, number: int, parts: int = 1) -> dict[str, Tensor]:
    """One gradient step on the same eight pictures, optionally in parts; gradients are left in place."""
    share, values = 8 // parts, {}
    for part in range(parts):
        batch = stage.dataset.__getitems__(
            [Slot(i, 0, 8 * number + i) for i in range(part * share, (part + 1) * share)]
        )
        values = stage.backward(batch, number, 1 / parts)
    stage.after_backward(number)
    return values


def gradients(module: torch.nn.Module) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in module.parameters()])


def weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def test_who_moves_when(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    stage, loop = make()
    for number in range(6):
        critic, model = weights(stage.discriminator), weights(stage.model)
        values = step(stage, loop, number)
        loop.step(number, 1e-3)
        assert not torch.equal(weights(stage.model), model)
        assert torch.equal(weights(stage.discriminator), critic) == (number < 2)
        assert ("discriminator" in values) == (number >= 2)


def test_the_adversarial_gradient_reaches_the_decoder_from_its_start(
    make: Callable[..., tuple[AutoencoderStage, Loop]],
) -> None:
    """Until then the step is that of a run without an adversary, bit for bit; afterwards it is not."""
    (stage, loop), (plain, plain_loop) = make(), make(loss__adversarial="0")
    for number in range(6):
        step(stage, loop, number), step(plain, plain_loop, number)
        assert torch.equal(gradients(stage.model), gradients(plain.model)) == (number < 4)
        loop.step(number, 1e-3), plain_loop.step(number, 1e-3)


def test_the_ramp(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    stage, _ = make(loss__adversarial_ramp="4")
    assert [stage.ramp(n) for n in (0, 3, 4, 5, 7, 100)] == [0, 0, 0.25, 0.5, 1, 1]
    assert make(loss__adversarial="0")[0].ramp(100) == 0


def test_balance_makes_the_norms_equal(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    """balance * |adversarial gradient| = |reconstruction gradient| at the decoder's last layer."""
    stage, loop = make()
    stage.balance = torch.zeros(())
    step(stage, loop, 4)  # the reconstruction's gradient alone, and the balance that belongs to it
    last, balance = stage.model.last_layer, stage.balance
    reconstruction = last.grad.clone()  # type: ignore[union-attr]
    loop.optimizers["autoencoder"].zero_grad()
    step(stage, loop, 4)
    adversarial = last.grad - reconstruction  # type: ignore[operator]
    assert balance > 0 and torch.equal(balance, stage.balance)
    assert adversarial.norm() == pytest.approx(stage.loss.adversarial * reconstruction.norm().item(), rel=1e-3)


def test_perceptual_gradient(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    (stage, loop), (plain, plain_loop) = make(), make(loss__perceptual="0")
    step(stage, loop, 0), step(plain, plain_loop, 0)
    difference = stage.model.last_layer.grad - plain.model.last_layer.grad  # type: ignore[operator]
    assert difference.norm() > 1e-3
    assert all(p.grad is None for p in stage.perceptual.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_give_the_same_gradients(make: Callable[..., tuple[AutoencoderStage, Loop]], parts: int) -> None:
    (whole, whole_loop), (split, split_loop) = (make(loss__reconstruction="l2") for _ in range(2))  # l1 has kinks
    for number in range(6):
        step(whole, whole_loop, number), step(split, split_loop, number, parts)
        for ours, theirs in ((whole.model, split.model), (whole.discriminator, split.discriminator)):
            difference = (gradients(ours) - gradients(theirs)).norm()
            assert difference <= 1e-3 * gradients(ours).norm(), number
        assert float(whole.balance) == pytest.approx(float(split.balance), rel=1e-3)
        whole_loop.step(number, 1e-5), split_loop.step(number, 1e-5)


def test_a_gradient_that_is_not_finite_stops_before_the_weights(
    make: Callable[..., tuple[AutoencoderStage, Loop]],
) -> None:
    from training.errors import UserError

    stage, loop = make()
    step(stage, loop, 0)
    before = weights(stage.model)
    stage.model.last_layer.grad[0, 0, 0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(UserError, match="grad_norm of the autoencoder is not finite at step 0") as caught:
        loop.step(0, 1e-3)
    assert caught.value.code == 5 and torch.equal(weights(stage.model), before)


def test_the_normaliser(make: Callable[..., tuple[AutoencoderStage, Loop]]) -> None:
    """The last act: latents of the data have mean 0 and variance 1 per channel."""
    stage, _ = make()
    stage.normalise()
    images = next(iter(stage.looks(stage.dataset, 96, 96)))
    moments = stage.model.encode(images)
    latents = torch.cat([stage.model.norm.latents(moments, torch.randn(96, 4, 8, 8)) for _ in range(20)])
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=0.05)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=0.05)
