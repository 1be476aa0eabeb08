"""The discriminators: published size, receptive field by gradient, small images, and a judgement by frozen features."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoencoder.discriminator import DISCRIMINATORS, Discriminator, FeatureGAN, PatchGAN, maps
from autoencoder.losses import ADVERSARIALS, Adversarial


class Levels(nn.Module):
    """A feature network of five levels, each half the size of the one before, the finest of the images' size."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        widths = (3, 4, 6, 8, 8, 8)
        layers = (nn.Conv2d(i, o, 3, 1 + (n > 0), 1) for n, (i, o) in enumerate(pairwise(widths)))
        self.layers = nn.ModuleList(layers)
        self.scale = scale
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        found = [images]
        for layer in self.layers:
            found.append(layer(found[-1]).relu())
        return [level * self.scale for level in found[1:]]


def built(kind: type[Any], features: nn.Module | None = None, **changes: Any) -> tuple[Discriminator, nn.Module]:
    torch.manual_seed(0)
    config: Discriminator = kind(**{"width": 8, "layers": 2, **changes})
    return config, config.build(features or Levels())


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
    tried = 0
    for config in DISCRIMINATORS:
        if change.keys() <= {field.name for field in dataclasses.fields(config)}:
            tried += 1
            with pytest.raises(ValueError):
                config(**change)  # type: ignore[arg-type]
    assert tried >= 2


@pytest.mark.parametrize("game", ADVERSARIALS, ids=lambda game: game().kind)
@pytest.mark.parametrize("kind", DISCRIMINATORS, ids=lambda kind: kind.kind)
def test_every_member_learns_to_tell_and_leads_images(kind: type[Any], game: type[Adversarial]) -> None:
    """Its loss falls in a few steps; the gradient at images is there for each of them, and finite on a flat one."""
    _, model = built(kind)
    images = torch.cat([torch.randn(4, 3, 40, 32), torch.zeros(1, 3, 40, 32)])
    fakes, losses = 0.3 * images.roll(1, 0) + 0.2, []
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(12):
        pairs = zip(maps(model(images)), maps(model(fakes)), strict=True)
        loss = torch.stack([game().discriminator(real, fake).mean() for real, fake in pairs]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    fakes.requires_grad_()
    torch.stack([game().generator(fake).mean() for fake in maps(model(fakes))]).mean().backward()
    assert fakes.grad is not None and fakes.grad.isfinite().all()
    assert (fakes.grad.flatten(1).norm(dim=1)[1:] > 0).all()


@pytest.mark.parametrize("kind", DISCRIMINATORS, ids=lambda kind: kind.kind)
def test_every_member_keeps_images_apart_and_names_its_least_size(kind: type[Any]) -> None:
    config, model = built(kind)
    side = config.smallest_image
    images = torch.randn(3, 3, side, side + 4)
    for both, first in zip(maps(model(images)), maps(model(images[:1])), strict=True):
        assert both.shape[1] == 1 and min(both.shape) >= 1
        torch.testing.assert_close(both[:1], first)
    with pytest.raises(ValueError, match=f"at least {side} pixels a side"):
        model(images[..., :-1, :])


def test_features_are_frozen_apart_and_their_scale_does_not_matter() -> None:
    """The heads alone are parameters and state; features a thousand times smaller give the same logits."""
    features = Levels()
    _, model = built(FeatureGAN, features, layers=3)
    assert {key.partition(".")[0] for key in model.state_dict()} == {"heads"}
    assert {id(p) for p in model.parameters()}.isdisjoint({id(p) for p in features.parameters()})
    small = Levels(1e-3)
    small.load_state_dict(features.state_dict())
    _, other = built(FeatureGAN, small, layers=3)
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 48)
    logits = model(images)
    assert [tuple(part.shape) for part in logits] == [(2, 1, 8, 12), (2, 1, 4, 6), (2, 1, 2, 3)]  # the last three
    for ours, theirs in zip(logits, other(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    by_hand = features(images)[2]
    by_hand = by_hand / by_hand.square().mean((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(model.heads[0](by_hand), logits[0])  # type: ignore[index, operator]


def test_features_are_asked_for() -> None:
    with pytest.raises(ValueError, match="needs a feature network"):
        FeatureGAN().build()
    with pytest.raises(ValueError, match="5 levels, fewer than 6"):
        FeatureGAN(layers=6).build(Levels())


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_the_networks_of_lpips_serve(net: str) -> None:
    """Each gives its last four levels at its least side; R1's second derivative goes through it."""
    from autoencoder.critic import r1
    from training.models.lpips import load_perceptual

    features = load_perceptual(net, "random").features
    before = {key: value.clone() for key, value in features.state_dict().items()}
    _, model = built(FeatureGAN, features, layers=4)
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    logits = model(images)
    assert len(logits) == 4
    r1(logits, images).sum().backward()
    kernel = model.heads[0][0].weight  # type: ignore[index, union-attr]
    assert kernel.grad.isfinite().all() and kernel.grad.norm() > 0  # type: ignore[union-attr, operator]
    assert images.grad is not None and images.grad.norm() > 0
    assert all(torch.equal(value, before[key]) for key, value in features.state_dict().items())
