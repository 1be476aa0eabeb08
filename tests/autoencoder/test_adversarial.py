"""The split gradient: equal to the plain backward pass, balanced at the last layer, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoencoder.adversarial import adaptive_weight, last_layer_gradients, split_gradients, surrogate
from autoencoder.discriminator import PatchGAN
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
