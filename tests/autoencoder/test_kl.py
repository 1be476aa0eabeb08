"""The KL autoencoder against the published parameter counts and diffusers' AutoencoderKL."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder.kl import KL, KLAutoencoder

SMALL = KL(channels=(8, 16), blocks=1, latent_channels=2, groups=4)
FAMILY = {
    55_312_063: KL(channels=(128, 256, 512), latent_channels=3),
    83_653_863: KL(),
    69_610_963: KL(channels=(128, 128, 256, 256, 512), latent_channels=16, attention_at=(16,)),
    103_880_131: KL(channels=(128, 128, 256, 256, 512, 512), latent_channels=64, attention_at=(16, 32)),
    83_821_011: KL(latent_channels=16),  # Stable Diffusion 3's 83,819,683 and the two 1x1 convolutions it leaves out
    69_836_067: KL(channels=(128, 128, 256, 256, 512), latent_channels=32, attention_at=(16,)),
}
MIDDLE = 2 * (4 * (512 * 512 + 512) + 2 * 512)  # attention of 512 channels in encoder and decoder


@pytest.mark.parametrize("count", FAMILY)
def test_parameter_counts_of_the_ldm_family(count: int) -> None:
    with torch.device("meta"):
        model, plain = FAMILY[count].build(), dataclasses.replace(FAMILY[count], mid_attention=False).build()
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in plain.parameters()) == count - MIDDLE


def diffusers_twin(config: KL) -> Any:
    diffusers = pytest.importorskip("diffusers")
    levels = range(len(config.channels))
    down = ["AttnDownEncoderBlock2D" if 2**i in config.attention_at else "DownEncoderBlock2D" for i in levels]
    up = ["AttnUpDecoderBlock2D" if 2**i in config.attention_at else "UpDecoderBlock2D" for i in reversed(levels)]
    return diffusers.AutoencoderKL(
        in_channels=config.image_channels, out_channels=config.image_channels, down_block_types=tuple(down),
        up_block_types=tuple(up), block_out_channels=config.channels, layers_per_block=config.blocks,
        latent_channels=config.latent_channels, norm_num_groups=config.groups,
        mid_block_add_attention=config.mid_attention,
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        KL(channels=(8,), blocks=1, latent_channels=1, groups=8, image_channels=1),
        KL(channels=(8, 16, 16), blocks=2, latent_channels=3, groups=8, mid_attention=False),
        KL(channels=(8, 8, 16, 24), blocks=2, latent_channels=4, groups=8, attention_at=(2, 8)),
    ],
    ids=["f2", "f1-grey", "f4-no-attention", "f8-attention-at"],
)
def test_keys_and_values_are_those_of_diffusers(config: KL) -> None:
    torch.manual_seed(0)
    theirs, ours = diffusers_twin(config), config.build().eval()
    outcome = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not outcome.unexpected_keys
    assert outcome.missing_keys == ["norm.shift", "norm.scale"]
    images = torch.rand(2, config.image_channels, 2 * config.factor, 4 * config.factor) * 2 - 1
    with torch.no_grad():
        moments = ours.encode(images)
        expected = theirs.encode(images).latent_dist
        torch.testing.assert_close(moments, expected.parameters, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            ours.decode(expected.mean), theirs.decode(expected.mean).sample, atol=1e-5, rtol=1e-5
        )


@pytest.fixture
def model() -> KLAutoencoder:
    torch.manual_seed(0)
    return SMALL.build()


def test_forward_is_encode_sample_decode(model: KLAutoencoder) -> None:
    images, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 2, 4, 4)
    reconstruction, moments = model(images, noise)
    torch.testing.assert_close(moments, model.encode(images))
    torch.testing.assert_close(reconstruction, model.decode(model.norm.latents(moments, noise)))
    model.norm.set_(torch.tensor([0.3, -2.0]), torch.tensor([5.0, 0.1]))
    torch.testing.assert_close(model.decode(model.norm.latents(moments, noise)), reconstruction, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(images, noise)[0], reconstruction)


def test_last_layer_encoder_state_and_attributes(model: KLAutoencoder) -> None:
    assert model.last_layer.shape == (3, 8, 3, 3)
    assert model.last_layer is model.decoder.conv_out.weight
    parts = {key.split(".")[0] for key in model.encoder_state()}
    assert parts == {"encoder", "quant_conv"}
    assert (model.factor, model.latent_channels, model.image_channels) == (2, 2, 3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_and_autocast_change_nothing_but_rounding(
    model: KLAutoencoder, layout: torch.memory_format
) -> None:
    images, noise = torch.rand(2, 3, 8, 12), torch.randn(2, 2, 4, 6)
    expected, _ = model(images, noise)
    laid = model.to(memory_format=layout)
    actual, _ = laid(images.contiguous(memory_format=layout), noise)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half, moments = laid(images, noise)
    assert half.dtype == moments.dtype == torch.float32
    assert (half - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_half_precision_weights_give_float32_out(model: KLAutoencoder) -> None:
    model.bfloat16()
    reconstruction, moments = model(torch.rand(1, 3, 8, 8), torch.randn(1, 2, 4, 4))
    assert reconstruction.dtype == moments.dtype == torch.float32


@pytest.mark.parametrize("call", ["encode", "forward"])
def test_size_not_divisible_is_one_sentence(model: KLAutoencoder, call: str) -> None:
    arguments: list[Tensor | None] = [torch.zeros(1, 3, 8, 7)] + ([None] if call == "forward" else [])
    with pytest.raises(ValueError, match="8x7 must be divisible by the autoencoder's factor 2"):
        getattr(model, call)(*arguments)


def test_wrong_channels_are_one_sentence(model: KLAutoencoder) -> None:
    with pytest.raises(ValueError, match="3, height, width"):
        model.encode(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="2, height, width"):
        model.decode(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (48, 64)}, "48 must be divisible by groups 32: take 32 or 64"),
        ({"channels": (16,)}, "take 32, or other groups"),
        ({"channels": ()}, "at least one level"),
        ({"blocks": 0}, "at least 1"),
        ({"attention_at": (3,)}, r"\(1, 2, 4, 8\)"),
        ({"latent_channels": 0}, "at least 1"),
    ],
)
def test_bad_shapes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KL(**change)  # type: ignore[arg-type]


def test_any_size_and_batch_of_one(model: KLAutoencoder) -> None:
    for height, width in ((2, 2), (6, 10), (2, 16)):
        reconstruction, moments = model(torch.zeros(1, 3, height, width), None)
        assert reconstruction.shape == (1, 3, height, width)
        assert moments.shape == (1, 4, height // 2, width // 2)
        assert reconstruction.isfinite().all()
