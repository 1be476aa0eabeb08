"""Reconstruction and adversarial losses: values by hand, per image, and gradients with the right sign."""

from __future__ import annotations

import math

import pytest
import torch

from autoencoder.losses import (
    ADVERSARIALS,
    L1,
    L2,
    RECONSTRUCTIONS,
    Adversarial,
    Charbonnier,
    Hinge,
    LeastSquares,
    NonSaturating,
)


@pytest.mark.parametrize("kind", RECONSTRUCTIONS)
def test_reconstruction_is_zero_at_the_image_and_per_image(kind: type) -> None:
    loss = kind()
    images, noise = torch.rand(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    assert loss(images, images).abs().max() < 1e-8
    together = loss(images + noise, images)
    assert together.shape == (3,)
    torch.testing.assert_close(together[1:2], loss((images + noise)[1:2], images[1:2]))
    leaf = images.clone().requires_grad_()
    loss(leaf, images).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_reconstruction_values_by_hand() -> None:
    x_hat, images = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, -1.0]])
    assert L1()(x_hat, images).item() == 2
    assert L2()(x_hat, images).item() == 5
    expected = (math.sqrt(9.25) + math.sqrt(1.25)) / 2 - 0.5
    assert Charbonnier(epsilon=0.5)(x_hat, images).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="epsilon must be positive"):
        Charbonnier(epsilon=0.0)


def test_adversarial_values_by_hand() -> None:
    real, fake = torch.tensor([[2.0, 0.0]]), torch.tensor([[-3.0, 1.0]])
    assert Hinge().discriminator(real, fake).item() == 0.5 * (0.5 + 1)
    assert Hinge().generator(fake).item() == 1
    log_sigmoid = [-math.log(1 / (1 + math.exp(-v))) for v in (2, 0, 3, -1)]
    expected = 0.5 * (sum(log_sigmoid[:2]) / 2 + sum(log_sigmoid[2:]) / 2)
    assert NonSaturating().discriminator(real, fake).item() == pytest.approx(expected)
    assert LeastSquares().discriminator(real, fake).item() == 0.5 * (1 + 5)
    assert LeastSquares().generator(fake).item() == 8


@pytest.mark.parametrize("kind", ADVERSARIALS)
def test_the_two_sides_pull_apart(kind: type[Adversarial]) -> None:
    loss = kind()
    real, fake = torch.zeros(2, 1, 3, 3, requires_grad=True), torch.zeros(2, 1, 3, 3, requires_grad=True)
    up, down = torch.autograd.grad(loss.discriminator(real, fake).mean(), (real, fake))
    assert (up < 0).all()
    assert (down >= 0).all()
    (generator,) = torch.autograd.grad(loss.generator(fake).mean(), fake)
    assert (generator < 0).all()


@pytest.mark.parametrize("kind", ADVERSARIALS)
def test_huge_logits_stay_finite(kind: type[Adversarial]) -> None:
    logits = torch.tensor([[1e4, -1e4]])
    assert kind().generator(logits).isfinite().all()
    assert kind().discriminator(logits, logits).isfinite().all()
