"""Alignment of latents with a vision model: the formula by hand, who gets a gradient, that it is learned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoencoder.alignment import Alignment, VisionFeatures

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


class Tokens(nn.Module):
    """A vision model of one strided convolution, its map or, behind `lead` other tokens, its tokens."""

    def __init__(self, lead: int | None = None) -> None:
        super().__init__()
        self.patch, self.lead = nn.Conv2d(3, 6, 4, 4), lead
        self.seen: Tensor | None = None

    def forward(self, pixel_values: Tensor) -> Any:
        self.seen = pixel_values
        features = self.patch(pixel_values)
        if self.lead is not None:
            tokens = features.flatten(2).transpose(1, 2)
            features = torch.cat([torch.full((len(tokens), self.lead, 6), 99.0), tokens], 1)
        return SimpleNamespace(last_hidden_state=features)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_formula_by_hand() -> None:
    torch.manual_seed(0)
    module, z, features = Alignment(2, 3, 0.4, 0.1), torch.randn(2, 2, 2, 3), torch.randn(2, 3, 2, 3)
    matrix = module.projection.weight.detach().numpy()[:, :, 0, 0]
    for image, found in enumerate(module(z, features).tolist()):
        ours = [matrix @ z[image].flatten(1).numpy()[:, i] for i in range(6)]
        theirs = [features[image].flatten(1).numpy()[:, i] for i in range(6)]
        near = np.mean([max(0.0, 1 - 0.4 - cosine(o, t)) for o, t in zip(ours, theirs, strict=True)])
        pairs = [(i, j) for i in range(6) for j in range(6)]
        unlike = [abs(cosine(ours[i], ours[j]) - cosine(theirs[i], theirs[j])) for i, j in pairs]
        assert found == pytest.approx(near + np.mean([max(0.0, u - 0.1) for u in unlike]), rel=1e-5)


def test_within_the_margins_it_costs_nothing() -> None:
    module, z = Alignment(4, 4), torch.randn(2, 4, 3, 3)
    nn.init.eye_(module.projection.weight[:, :, 0, 0])  # type: ignore[arg-type]
    assert module(z, 5 * z).tolist() == [0, 0]
    assert (module(z, -z) == 1.5 - 1 + 1).all()  # opposite everywhere: 1 - ½ + 1; the same distances
    assert (Alignment(4, 4, 0, 0)(z, z) > 0).all()


def test_vanishing_latents_have_finite_gradients() -> None:
    module, z = Alignment(2, 3), torch.zeros(1, 2, 4, 4, requires_grad=True)
    module(z, torch.randn(1, 3, 4, 4)).sum().backward()
    assert z.grad is not None and z.grad.isfinite().all()


@pytest.mark.parametrize("lead", [None, 0, 1, 5])
def test_features_lie_on_the_grid(lead: int | None) -> None:
    """Map or tokens, class and register tokens left out; pictures in the model's size and normalisation."""
    torch.manual_seed(0)
    network = Tokens(lead)
    vision, images = VisionFeatures(network, 16, MEAN, STD), torch.rand(2, 3, 16, 16) * 2 - 1
    assert vision.width == 6
    found = vision(images, (4, 4))
    normal = ((images + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert network.seen is not None
    torch.testing.assert_close(network.seen, normal)
    torch.testing.assert_close(found, network.patch(normal))
    assert vision(images[..., :8], (8, 4)).shape == (2, 6, 8, 4) and network.seen.shape == (2, 3, 16, 16)
    assert vision(images[:, :1], (2, 2)).shape == (2, 6, 2, 2)
    flat = vision(torch.ones(1, 3, 32, 24) * 0.5, (3, 5))
    torch.testing.assert_close(flat, flat[..., :1, :1].expand_as(flat))


def test_the_gradient_reaches_latents_and_projection_only_and_is_learned() -> None:
    torch.manual_seed(0)
    vision, images = VisionFeatures(Tokens(1), 16, MEAN, STD), torch.rand(8, 3, 16, 16) * 2 - 1
    before = [p.clone() for p in vision.parameters()]
    encoder, module = nn.Conv2d(3, 4, 4, 4), Alignment(4, vision.width, 0.1, 0.05)
    images.requires_grad_()
    module(encoder(images.detach()), vision(images, (4, 4))).mean().backward()
    assert images.grad is None and all(p.grad is None for p in vision.parameters())
    assert encoder.weight.grad is not None and encoder.weight.grad.norm() > 0
    assert module.projection.weight.grad is not None and module.projection.weight.grad.norm() > 0
    optimizer, losses = torch.optim.Adam([*encoder.parameters(), *module.parameters()], 1e-2), []
    for _ in range(60):
        loss = module(encoder(images.detach()), vision(images, (4, 4))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(p, q) for p, q in zip(vision.parameters(), before, strict=True))


def test_a_network_without_features_is_refused() -> None:
    class Wrong(nn.Module):
        def forward(self, pixel_values: Tensor) -> Any:
            return SimpleNamespace(logits=pixel_values.mean((1, 2, 3)))

    with pytest.raises(ValueError, match="no last_hidden_state"):
        VisionFeatures(Wrong(), 16, MEAN, STD)


def test_it_stays_frozen_in_training() -> None:
    vision = VisionFeatures(Tokens(), 16, MEAN, STD)
    assert not vision.train().training and not vision.network.training
