"""Gradient checkpointing of autoencoders: the same pictures and gradients, much less kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from autoencoder import AUTOENCODERS
from autoencoder.dc import DC
from autoencoder.identity import Identity
from autoencoder.kl import KL
from autoencoder.tiny import Tiny
from autoencoder.vq import FSQ, LFQ, VQ

NETWORK = {"channels": (8, 16), "groups": 4, "attention_at": (2,)}
SMALL = [
    KL(**NETWORK, latent_channels=2),
    VQ(**NETWORK, codes=8, codebook_decay=0.9),
    FSQ(**NETWORK),
    LFQ(**NETWORK, latent_channels=3),
    DC(channels=(8, 16, 32), encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1), latent_channels=4,
       attention_at=(4,), batch_norm_at=(2,)),
    Tiny(width=8, encoder_blocks=(1, 2), decoder_blocks=(2, 1), latent_channels=2),
]  # fmt: skip


def kept(config: Any) -> tuple[list[torch.Tensor], int]:
    """The answer, the gradients by a step's losses, and the numbers kept in between."""
    torch.manual_seed(0)
    model = config.build().double()
    images = torch.linspace(-1, 1, 2 * 3 * 16 * 16, dtype=torch.float64).view(2, 3, 16, 16).requires_grad_()
    count = [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        count[0] += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reconstruction, moments = model(images, None)
    loss = (reconstruction - images).square().sum()
    (balance,) = torch.autograd.grad(loss, model.last_layer, retain_graph=True)  # as the adversarial balance asks
    (loss + model.regularisation(moments).sum()).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    return [reconstruction, moments, balance, images.grad, *gradients, *model.state_dict().values()], count[0]  # type: ignore[list-item]


@pytest.mark.parametrize("config", SMALL, ids=lambda config: config.kind)
def test_checkpointing_changes_nothing_but_what_is_kept(config: Any) -> None:
    plain, whole = kept(config)
    saving, less = kept(replace(config, gradient_checkpointing=True))
    assert len(plain) == len(saving) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, saving, strict=True))
    assert less < 0.6 * whole, (less, whole)


def test_every_kind_of_autoencoder_with_layers_has_the_key() -> None:
    assert {type(config) for config in SMALL} == set(AUTOENCODERS) - {Identity}
