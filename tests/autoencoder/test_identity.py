"""The identity autoencoder: latents are the pixels, exactly, in either precision that latents are stored in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoencoder.identity import Identity
from autoencoder.images import to_uint8, to_unit
from autoencoder.tiles import decode_tiled, encode_tiled


def levels(channels: int) -> Tensor:
    """uint8 (2, C, 16, 32): every channel of each picture holds all 256 levels, each in another order."""
    generator = torch.Generator().manual_seed(channels)
    rows = [torch.randperm(256, generator=generator).repeat(2) for _ in range(2 * channels)]
    return torch.stack(rows).to(torch.uint8).view(2, channels, 16, 32)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_every_level_comes_back(channels: int, stored: torch.dtype) -> None:
    model, pixels = Identity(image_channels=channels).build(), levels(channels)
    moments = model.encode(to_unit(pixels))
    latents = model.norm.latents(moments.to(stored).float(), torch.randn(moments.shape))
    assert latents.shape == pixels.shape and moments.dtype == torch.float32
    assert torch.equal(to_uint8(model.decode(latents)), pixels)


def test_nothing_is_changed_on_the_way() -> None:
    """Bit for bit, in float64 too: latents, means, the answer of training's `forward`."""
    model, images = Identity().build().double(), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    reconstruction, z = model(images, None)
    for same in (model.encode(images), model.decode(images), reconstruction, z, model.norm.mean_latents(images)):
        assert torch.equal(same, images)
    assert model.regularisation(z).tolist() == [0.0, 0.0]
    model, halves = model.float(), images.half()
    assert model.encode(halves).dtype == model.decode(halves).dtype == torch.float32


def test_gradients_pass_unchanged() -> None:
    """As inverse problems in pixels need: d decode / d latents is the identity."""
    model, latents = Identity(image_channels=1).build(), torch.randn(1, 1, 4, 4, requires_grad=True)
    given = torch.randn(1, 1, 4, 4)
    assert torch.equal(torch.autograd.grad(model.decode(latents), latents, given)[0], given)


def test_tiles_are_seamless() -> None:
    model, pixels = Identity().build(), torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    latents = encode_tiled(model, to_unit(pixels), tile=16, overlap=4)
    assert torch.equal(to_uint8(decode_tiled(model, latents, tile=16, overlap=4)), pixels)


def test_it_has_no_parameters() -> None:
    """The state is the normaliser, shift 0 and scale 1; nothing in it decides the moments."""
    model = Identity().build()
    assert not list(model.parameters()) and model.encoder_state() == {}
    assert model.factor == 1 and model.latent_channels == model.image_channels == 3
    assert {key: value.unique().tolist() for key, value in model.state_dict().items()} == {
        "norm.shift": [0.0],
        "norm.scale": [1.0],
    }


def test_what_cannot_be_is_refused() -> None:
    model = Identity(image_channels=1).build()
    with pytest.raises(ValueError, match="at least 1"):
        Identity(image_channels=0)
    with pytest.raises(ValueError, match=r"\(batch, 1, height, width\)"):
        model.encode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\(batch, 1, height, width\)"):
        model.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="nothing to train"):
        _ = model.last_layer
