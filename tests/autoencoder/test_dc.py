"""The deep-compression autoencoder against diffusers' AutoencoderDC, and its shortcuts against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from autoencoder.dc import DC, Down, Up

SHAPES = {
    "convolutions": DC(
        channels=(8, 16, 16), encoder_blocks=(1, 1, 2), decoder_blocks=(2, 1, 1), latent_channels=4, attention_at=()
    ),
    "attention": DC(
        channels=(8, 16, 32, 64), encoder_blocks=(0, 1, 1, 1), decoder_blocks=(0, 1, 2, 1), latent_channels=8,
        attention_at=(4, 8),
    ),  # fmt: skip
}


def diffusers_twin(config: DC) -> Any:
    diffusers = pytest.importorskip("diffusers")
    levels = [2**i in config.attention_at for i in range(len(config.channels))]
    kinds = tuple("EfficientViTBlock" if attention else "ResBlock" for attention in levels)
    scales = tuple((5,) if attention else () for attention in levels)
    return diffusers.AutoencoderDC(
        in_channels=config.image_channels, latent_channels=config.latent_channels, encoder_block_types=kinds,
        decoder_block_types=kinds, encoder_block_out_channels=config.channels,
        decoder_block_out_channels=config.channels, encoder_layers_per_block=config.encoder_blocks,
        decoder_layers_per_block=config.decoder_blocks, encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_keys_and_values_are_those_of_diffusers(name: str) -> None:
    torch.manual_seed(0)
    config = SHAPES[name]
    theirs, ours = diffusers_twin(config), config.build().eval()
    for key, p in theirs.named_parameters():
        if "norm" in key:
            torch.nn.init.normal_(p, 0.5, 0.2)
    outcome = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not outcome.unexpected_keys and outcome.missing_keys == ["norm.shift", "norm.scale"]
    images = torch.rand(2, 3, 4 * config.factor, 6 * config.factor) * 2 - 1
    with torch.no_grad():
        z = ours.encode(images)
        torch.testing.assert_close(z, theirs.encode(images).latent, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, atol=1e-5, rtol=1e-4)


def test_the_parameters_of_the_default() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in model.parameters()) for model in (DC().build(), diffusers_twin(DC()))]
    assert sizes[0] == sizes[1] == 352_731_747
    assert DC().factor == 32


def test_shortcuts_lose_nothing_that_fits() -> None:
    """With dead convolutions a level keeps the means of its neighbours, and channels that fit come back unchanged."""
    down, up = Down(2, 8), Up(8, 2)
    for module in (down, up):
        torch.nn.init.zeros_(module.conv.weight)
        torch.nn.init.zeros_(module.conv.bias)  # type: ignore[arg-type]
    x = torch.randn(2, 2, 6, 4)
    assert torch.equal(down(x), F.pixel_unshuffle(x, 2)) and torch.equal(up(down(x)), x)
    halved = Down(2, 4)
    torch.nn.init.zeros_(halved.conv.weight)
    torch.nn.init.zeros_(halved.conv.bias)  # type: ignore[arg-type]
    expected = F.pixel_unshuffle(x, 2).view(2, 4, 2, 3, 2).mean(2)
    torch.testing.assert_close(halved(x), expected)


@pytest.mark.parametrize("name", SHAPES)
def test_one_backward_trains_everything_and_latents_are_normalised(name: str) -> None:
    torch.manual_seed(0)
    config = SHAPES[name]
    model, images = config.build(), torch.rand(2, 3, 2 * config.factor, 2 * config.factor)
    reconstruction, z = model(images, None)
    assert z.shape == (2, config.latent_channels, 2, 2) and reconstruction.shape == images.shape
    ((reconstruction - images).square().mean() + model.regularisation(z).mean()).backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key
    model.norm.set_(torch.randn(config.latent_channels), torch.rand(config.latent_channels) + 0.5)
    torch.testing.assert_close(model.decode(model.norm.latents(z, None)), reconstruction, atol=1e-4, rtol=1e-4)
    assert model.last_layer.shape[0] in (3, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (128,)}, "two levels or more"),
        ({"encoder_blocks": (2, 2)}, "each with its blocks"),
        ({"encoder_blocks": (2, 2, 0, 3, 3, 3)}, "at least 1 block"),
        ({"channels": (8, 64, 128, 128, 128, 128)}, "shortcut from 8 to 64"),
        ({"latent_channels": 48}, "must divide"),
        ({"attention_at": (64,)}, "must name factors"),
        ({"image_channels": 0}, "at least 1"),
    ],
)
def test_bad_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DC(**change)
