"""Every weight of stage one's loss: what it multiplies, in the loss that is told and in the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import autoencoder_steps
import pytest
import torch
from autoencoder_steps import NETWORK, gradients, pictures
from torch import Tensor

from autoencoder.images import to_unit
from autoencoder.posterior import Posterior
from ldm.noise import Noise
from training.loop.loop import Loop
from training.stages.autoencoder import AutoencoderStage

make = autoencoder_steps.make
Make = Callable[..., tuple[AutoencoderStage, Loop]]
OFF = {"loss__adversarial": "0", "loss__perceptual": "0", "loss__kl": "0"}
# Of each: the changes to a config of reconstruction alone, and what its weight multiplies.
TERMS: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "perceptual": ({}, lambda stage, images, x_hat, moments: stage.perceptual(x_hat, images).mean()),
    "kl": ({}, lambda stage, images, x_hat, moments: Posterior.split(moments).kl().mean() / images[0].numel()),
    "codebook": (
        {"model": {**NETWORK, "kind": "vq", "codes": 64}},
        lambda stage, images, x_hat, moments: stage.model.regularisation(moments).mean(),
    ),
    "align": (
        {"loss__align_cosine_margin": "0.1"},
        lambda stage, images, x_hat, moments: stage.networks["alignment"](
            stage.model.norm.mean_latents(moments), stage.vision(images, (8, 8))
        ).mean(),
    ),
}


@pytest.mark.parametrize("name", TERMS)
def test_the_weight_of_a_term_in_loss_and_gradient(make: Make, name: str) -> None:
    """The loss is mean |x̂ − x| + 3 · term, and its gradient is the one that is trained on.

    The posterior's noise is keyed by (seed, step, slot).
    """
    changes, term = TERMS[name]
    stage, _ = make(**{**OFF, **changes, f"loss__{name}": "3"})
    images, noise = to_unit(pictures(stage, 3).data), Noise(24 + torch.arange(8))
    x_hat, moments = stage.model(images, noise.normal((stage.model.latent_channels, 8, 8), stage.seed, 3, "posterior"))
    part = term(stage, images, x_hat, moments)
    loss = (x_hat - images).abs().mean() + 3 * part
    wanted = torch.autograd.grad(loss, list(stage.model.parameters()), allow_unused=True)
    values = stage.backward(pictures(stage, 3), 3, 1.0)
    assert part > 0 and values["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    flat = torch.cat([p.new_zeros(p.numel()) if g is None else g.flatten()
                      for g, p in zip(wanted, stage.model.parameters(), strict=True)])  # fmt: skip
    torch.testing.assert_close(gradients(stage.model), flat, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["r1", "lecam"])
def test_the_weight_of_a_critics_penalty(make: Make, name: str) -> None:
    """Its part of the critic's gradient grows with it: three times the weight, three times the part."""
    found = []
    for weight in ("0", "1", "3"):
        stage, _ = make(**{**OFF, "loss__adversarial": "0.5", f"loss__{name}": weight})
        stage.adversary.anchors = torch.tensor([2.0, -2.0])
        stage.backward(pictures(stage, 2), 2, 1.0)
        found.append(gradients(stage.discriminator))
    without, once, thrice = found
    assert (once - without).norm() > 1e-4 * without.norm()
    torch.testing.assert_close(thrice - without, 3 * (once - without), rtol=1e-3, atol=1e-6)
