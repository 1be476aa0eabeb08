"""The deep-compression autoencoder against diffusers' AutoencoderDC, and its shortcuts against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from autoencoder.dc import DC
from autoencoder.dc_blocks import Down, FixedBatchNorm, Up

# The last two are the published models, with fewer and narrower levels.
PUBLISHED = {
    "sana": DC(resample="conv"),
    "imagenet f32": DC(encoder_blocks=(0, 4, 8, 2, 2, 2), decoder_blocks=(0, 5, 10, 2, 2, 2), scales=(),
                       batch_norm_at=(1, 2, 4)),
    "imagenet f64": DC(channels=(128, 256, 512, 512, 1024, 1024, 2048), encoder_blocks=(0, 4, 8, 2, 2, 2, 2),
                       decoder_blocks=(0, 5, 10, 2, 2, 2, 2), latent_channels=128, scales=(),
                       attention_at=(8, 16, 32, 64), batch_norm_at=(1, 2, 4)),
    "imagenet f128": DC(channels=(128, 256, 512, 512, 1024, 1024, 2048, 2048), encoder_blocks=(0, 4, 8, 2, 2, 2, 2, 2),
                        decoder_blocks=(0, 5, 10, 2, 2, 2, 2, 2), latent_channels=512, scales=(),
                        attention_at=(8, 16, 32, 64, 128), batch_norm_at=(1, 2, 4)),
}  # fmt: skip
SHAPES = {
    "convolutions": DC(
        channels=(8, 16, 16), encoder_blocks=(1, 1, 2), decoder_blocks=(2, 1, 1), latent_channels=4, attention_at=()
    ),
    "attention": DC(
        channels=(8, 16, 32, 64), encoder_blocks=(0, 1, 1, 1), decoder_blocks=(0, 1, 2, 1), latent_channels=8,
        attention_at=(4, 8),
    ),
    "sana": DC(
        channels=(8, 16, 32), encoder_blocks=(1, 1, 1), decoder_blocks=(1, 2, 1), latent_channels=4, attention_at=(4,),
        resample="conv",
    ),
    "conv without blocks of the finest": DC(
        channels=(8, 16, 32), encoder_blocks=(0, 1, 1), decoder_blocks=(0, 1, 1), latent_channels=4, attention_at=(4,),
        resample="conv", scales=(3, 5),
    ),
    "imagenet": DC(
        channels=(8, 16, 16, 32), encoder_blocks=(0, 1, 2, 1), decoder_blocks=(0, 2, 1, 1), latent_channels=4,
        attention_at=(8,), scales=(), batch_norm_at=(1, 2, 4),
    ),
}  # fmt: skip


def diffusers_twin(config: DC) -> Any:
    diffusers = pytest.importorskip("diffusers")
    levels = [2**i in config.attention_at for i in range(len(config.channels))]
    kinds = tuple("EfficientViTBlock" if attention else "ResBlock" for attention in levels)
    scales = tuple(config.scales if attention else () for attention in levels)
    odd = [2**i in config.batch_norm_at for i in range(len(config.channels))]
    down, up = ("conv", "interpolate") if config.resample == "conv" else ("pixel_unshuffle", "pixel_shuffle")
    return diffusers.AutoencoderDC(
        in_channels=config.image_channels, latent_channels=config.latent_channels, encoder_block_types=kinds,
        decoder_block_types=kinds, encoder_block_out_channels=config.channels,
        decoder_block_out_channels=config.channels, encoder_layers_per_block=config.encoder_blocks,
        decoder_layers_per_block=config.decoder_blocks, encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
        downsample_block_type=down, upsample_block_type=up,
        decoder_norm_types=tuple("batch_norm" if one else "rms_norm" for one in odd),
        decoder_act_fns=tuple("relu" if one else "silu" for one in odd),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_keys_and_values_are_those_of_diffusers(name: str) -> None:
    torch.manual_seed(0)
    config = SHAPES[name]
    theirs, ours = diffusers_twin(config), config.build().eval()
    for key, p in theirs.named_parameters():
        if "norm" in key:
            torch.nn.init.normal_(p, 0.5, 0.2)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after training
            torch.nn.init.normal_(module.running_mean, 0.1, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.2, 3.0)
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


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_tensors(name: str) -> None:
    """Every key and shape, at full size, without memory for it."""
    with torch.device("meta"):
        ours, theirs = (m.state_dict() for m in (PUBLISHED[name].build(), diffusers_twin(PUBLISHED[name])))
    assert {key: x.shape for key, x in ours.items() if not key.startswith("norm.")} == {
        k: x.shape for k, x in theirs.items()
    }


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


def test_fixed_statistics_know_no_batch() -> None:
    """In training mode a sample's answer is its own, and the statistics stay those that were read."""
    torch.manual_seed(0)
    norm, x = FixedBatchNorm(3).train(), torch.randn(4, 3, 5, 5) * 2 + 1
    norm.running_mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
    expected = (x - norm.running_mean.view(3, 1, 1)) / (norm.running_var.view(3, 1, 1) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected)
    assert torch.equal(norm(x)[:1], norm(x[:1])) and norm.running_mean.tolist() == [1, -2, 0]


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
        ({"batch_norm_at": (8,)}, "levels without attention"),
        ({"batch_norm_at": (3,)}, "levels without attention"),
        ({"scales": (4,)}, "odd kernel sizes"),
    ],
)
def test_bad_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DC(**change)
