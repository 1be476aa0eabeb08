"""The patch discriminator: published size, receptive field by gradient, and small images."""

from __future__ import annotations

import pytest
import torch

from autoencoder.discriminator import DISCRIMINATORS, PatchGAN


def parameters(config: PatchGAN) -> int:
    return sum(p.numel() for p in config.build().parameters())


def test_parameter_count_is_that_of_ldm() -> None:
    assert parameters(PatchGAN(norm="batch")) == parameters(PatchGAN()) == 2_765_633


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_receptive_field_by_gradient(layers: int, field: int) -> None:
    torch.manual_seed(0)
    model = PatchGAN(width=4, layers=layers, norm="none").build().double()
    images = torch.randn(1, 3, 160, 160, dtype=torch.float64, requires_grad=True)
    logits = model(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    seen = images.grad.abs().sum((0, 1)) > 0
    assert (int(seen.any(0).sum()), int(seen.any(1).sum())) == (field, field)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_smallest_image_gives_one_patch_and_less_is_one_sentence(norm: str, layers: int) -> None:
    config = PatchGAN(width=8, layers=layers, norm=norm)  # type: ignore[arg-type]
    model, side = config.build().eval(), config.smallest_image
    assert model(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"at least {side} pixels a side, got {side - 1}x"):
        model(torch.zeros(1, 3, side - 1, side))


def test_works_at_32_pixels() -> None:
    assert PatchGAN(layers=2, width=8).build()(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 6, 6)
    assert PatchGAN(layers=3, width=8).build()(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 2, 2)


def test_group_norm_keeps_images_independent() -> None:
    model = PatchGAN(width=8).build()
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


@pytest.mark.parametrize("change", [{"norm": "layer"}, {"layers": 0}, {"width": 0}, {"image_channels": 0}])
def test_bad_shapes_are_refused(change: dict[str, object]) -> None:
    for config in DISCRIMINATORS:
        with pytest.raises(ValueError):
            config(**change)  # type: ignore[arg-type]
