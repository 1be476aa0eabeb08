"""The split gradient: equal to the plain backward pass, balanced at the last layer, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoencoder.adversarial import adaptive_weight, last_layer_gradients, power_of_two, split_gradients, surrogate
from autoencoder.critic import r1
from autoencoder.discriminator import PatchGAN, maps
from autoencoder.kl import KL
from autoencoder.losses import L1, Hinge

F64 = torch.float64


@pytest.fixture
def scene() -> dict[str, object]:
    torch.manual_seed(0)
    model = KL(channels=(8, 8), blocks=1, latent_channels=2, groups=4).build().double()
    discriminator = PatchGAN(width=4, layers=1, norm="group").build().double()
    images, noise = torch.rand(3, 3, 12, 12, dtype=F64) * 2 - 1, torch.randn(3, 2, 6, 6, dtype=F64)

    def reconstruction(x_hat: Tensor) -> Tensor:
        return (x_hat - images).abs().mean()

    def adversarial(x_hat: Tensor) -> Tensor:
        return -discriminator(x_hat).mean()

    return locals()


def test_surrogate_gives_the_gradient_of_the_plain_sum(scene: dict) -> None:
    model, weight = scene["model"], 0.37
    x_hat, moments = model(scene["images"], scene["noise"])
    kl = model.regularisation(moments).mean()
    plain = scene["reconstruction"](x_hat) + weight * scene["adversarial"](x_hat) + 1e-3 * kl
    expected = torch.autograd.grad(plain, list(model.parameters()), retain_graph=True)
    split = split_gradients(x_hat, scene["reconstruction"], scene["adversarial"])
    (surrogate(x_hat, split.reconstruction + weight * split.adversarial) + 1e-3 * kl).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)


def test_split_leaves_every_parameter_alone(scene: dict) -> None:
    x_hat, _ = scene["model"](scene["images"], scene["noise"])
    split = split_gradients(x_hat, scene["reconstruction"], scene["adversarial"])
    last_layer_gradients(x_hat, scene["model"].last_layer, split)
    for module in (scene["model"], scene["discriminator"]):
        assert all(parameter.grad is None for parameter in module.parameters())
    torch.testing.assert_close(split.reconstruction_loss, scene["reconstruction"](x_hat).detach())
    assert not split.adversarial_loss.requires_grad


def test_before_the_start_there_is_no_adversarial_gradient(scene: dict) -> None:
    x_hat, _ = scene["model"](scene["images"], scene["noise"])
    split = split_gradients(x_hat, scene["reconstruction"], None)
    assert split.adversarial.abs().max() == 0 and split.adversarial_loss == 0


def test_discriminator_turn_gives_the_autoencoder_no_gradient(scene: dict) -> None:
    x_hat, _ = scene["model"](scene["images"], scene["noise"])
    real, fake = scene["discriminator"](scene["images"]), scene["discriminator"](x_hat.detach())
    Hinge().discriminator(real, fake).mean().backward()
    assert all(parameter.grad is None for parameter in scene["model"].parameters())
    assert all(parameter.grad is not None for parameter in scene["discriminator"].parameters())


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e3])
def test_adaptive_weight_makes_the_norms_equal(scene: dict, scale: float) -> None:
    x_hat, _ = scene["model"](scene["images"], scene["noise"])
    split = split_gradients(x_hat, lambda x: scale * scene["reconstruction"](x), scene["adversarial"])
    rec, adv = last_layer_gradients(x_hat, scene["model"].last_layer, split)
    direct = torch.autograd.grad(scene["adversarial"](x_hat), scene["model"].last_layer)[0]
    torch.testing.assert_close(adv, direct, rtol=1e-6, atol=1e-12)
    weight = adaptive_weight(rec.norm(), adv.norm(), maximum=1e9)
    torch.testing.assert_close(weight.double() * adv.norm(), rec.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaptive_weight_is_finite_whatever_comes(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    for rec, adv, expected in [(1, 0, 0), (0, 0, 0), (0, 1, 0), (nan, 1, 0), (1, nan, 0), (inf, 1, 0), (1, 1e-30, 1e4)]:
        weight = adaptive_weight(torch.tensor(rec, dtype=dtype), torch.tensor(adv, dtype=dtype))
        assert weight.dtype == torch.float32 and weight.item() == expected


def test_losses_must_be_scalars(scene: dict) -> None:
    x_hat, _ = scene["model"](scene["images"], scene["noise"])
    with pytest.raises(ValueError, match="scalar"):
        split_gradients(x_hat, lambda x: L1()(x, scene["images"]), None)


def test_split_works_under_autocast(scene: dict) -> None:
    model, discriminator = scene["model"].float(), scene["discriminator"].float()
    with torch.autocast("cpu", torch.bfloat16):
        x_hat, _ = model(scene["images"].float(), scene["noise"].float())
        split = split_gradients(
            x_hat, lambda x: (x - scene["images"].float()).abs().mean(), lambda x: -discriminator(x).float().mean()
        )
        weight = adaptive_weight(*(g.norm() for g in last_layer_gradients(x_hat, model.last_layer, split)))
    surrogate(x_hat, split.reconstruction + weight * split.adversarial).backward()
    assert weight > 0 and split.adversarial.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.decoder.parameters())


def balance(size: int, batch: int, dtype: torch.dtype | None, logit: float = 1.0) -> tuple[float, Tensor]:
    """The balance of one convolution's L1 and hinge losses under autocast, and the hinge's slope at the pictures."""
    torch.manual_seed(0)
    layer, critic = torch.nn.Conv2d(4, 3, 3, padding=1), PatchGAN(width=4, layers=2, norm="group").build()
    features, images = torch.rand(batch, 4, size, size), torch.rand(batch, 3, size, size) * 2 - 1

    def adversarial(x_hat: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = maps(critic(x_hat))
        return logit * torch.stack([-part.mean() for part in logits]).mean()

    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        x_hat = layer(features).float()
    split = split_gradients(x_hat, lambda x: (x - images).abs().mean(), adversarial)
    rec, adv = last_layer_gradients(x_hat, layer.weight, split)
    return adaptive_weight(rec.norm(), adv.norm()).item(), split.adversarial


@pytest.mark.parametrize(
    ("size", "batch", "logit"), [(64, 8, 1.0), (64, 8, 1e-2), (256, 16, 1.0), (256, 16, 1e-2), (256, 64, 1e-2)])
def test_the_balance_of_half_precision_is_that_of_float32(size: int, batch: int, logit: float) -> None:
    """The slope of a mean over 3 to 12 million values is no normal number of float16; a sure critic's is smaller."""
    expected, slope = balance(size, batch, None, logit)
    found, ours = balance(size, batch, torch.float16, logit)
    assert found == pytest.approx(expected, rel=0.02)
    assert ours.norm().item() == pytest.approx(slope.norm().item(), rel=0.02)
    assert (ours - slope).norm() < 0.1 * slope.norm()  # the critic's own rounding turns some of its units on or off


def test_the_scales_change_no_bit_of_float32() -> None:
    _, slope = balance(16, 2, None)
    torch.manual_seed(0)
    layer, critic = torch.nn.Conv2d(4, 3, 3, padding=1), PatchGAN(width=4, layers=2, norm="group").build()
    features, images = torch.rand(2, 4, 16, 16), torch.rand(2, 3, 16, 16) * 2 - 1
    x_hat = layer(features)
    (plain,) = torch.autograd.grad(-critic(leaf := x_hat.detach().requires_grad_()).mean(), leaf)
    assert torch.equal(slope, plain)
    split = split_gradients(x_hat, lambda x: (x - images).abs().mean(), lambda x: -critic(x).mean())
    for ours, given in zip(last_layer_gradients(x_hat, layer.weight, split), split[:2], strict=True):
        (theirs,) = torch.autograd.grad(x_hat, layer.weight, given, retain_graph=True)
        assert torch.equal(ours, theirs)


def test_a_power_of_two() -> None:
    """The largest that is no more than the value; 1 for what has none."""
    values = torch.tensor([1.0, 3.0, 0.3, 2.0**-100, 1.5 * 2.0**100, 0.0, torch.inf, torch.nan, -4.0])
    assert power_of_two(values).tolist() == [1.0, 2.0, 0.25, 2.0**-100, 2.0**100, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("size", [64, 256])
def test_r1_of_half_precision_is_that_of_float32(size: int) -> None:
    """The logits' slopes are summed, not averaged: they need no scale."""
    found = []
    for dtype in (None, torch.float16):
        torch.manual_seed(0)
        critic, images = PatchGAN(width=4, layers=2, norm="group").build(), torch.rand(2, 3, size, size) * 2 - 1
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = maps(critic(images.requires_grad_()))
        found.append(r1(logits, images))
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=0)
