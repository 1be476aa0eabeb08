"""R1 by closed form, LeCAM by hand, augmentations against their definitions, plateau, multi-scale discriminator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.critic import (
    AUGMENTATIONS,
    AUGMENTED_BY,
    Colour,
    Cutout,
    Plateau,
    Translation,
    augment,
    lecam,
    move_anchors,
    r1,
)
from autoencoder.discriminator import MultiScale, PatchGAN, maps

F64 = torch.float64


def test_r1_of_a_linear_critic_is_half_its_squared_weights() -> None:
    """D(x) = w·x has ∇D = w for every image; with two maps the slopes add."""
    weight = torch.randn(3, 4, 5, dtype=F64, requires_grad=True)
    images = torch.randn(2, 3, 4, 5, dtype=F64, requires_grad=True)
    logits = (images * weight).flatten(1).sum(1)
    penalty = r1([logits], images)
    torch.testing.assert_close(penalty, (0.5 * weight.square().sum()).expand(2))
    torch.testing.assert_close(r1([logits, 2 * logits], images), 9 * penalty)
    (at_weight,) = torch.autograd.grad(penalty.mean(), weight)
    torch.testing.assert_close(at_weight, weight)  # second order: the critic itself is moved


def test_r1_reaches_every_weight_of_the_patch_discriminator() -> None:
    torch.manual_seed(0)
    model, images = PatchGAN(width=4, layers=1).build(), torch.randn(2, 3, 16, 16, requires_grad=True)
    r1(maps(model(images)), images).mean().backward()
    for name, p in model.named_parameters():
        if not name.endswith("bias"):
            assert p.grad is not None and p.grad.norm() > 0, name


def test_lecam_by_hand() -> None:
    """mean relu(real − ā_fake)² + mean relu(ā_real − fake)²."""
    real, fake = torch.tensor([[2.0, -3.0]]), torch.tensor([[0.5, -1.0]])
    anchors = torch.tensor([1.0, -2.0])
    assert lecam(real, fake, anchors).item() == (16 + 0) / 2 + (0.25 + 4) / 2
    assert lecam(torch.full((1, 2), -2.0), torch.ones(1, 2), anchors).item() == 0  # no further apart: no pull
    first = move_anchors(None, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(move_anchors(first, torch.tensor([4.0, 0.0])), torch.tensor([3.01, 0.99]))


@pytest.mark.parametrize("member", AUGMENTATIONS)
def test_augmentations_are_per_image_and_differentiable(member: type) -> None:
    torch.manual_seed(0)
    change, images = member(), torch.rand(3, 3, 12, 9, dtype=F64)
    uniform = torch.rand(3, change.draws)
    together = change(images, uniform)
    assert together.shape == images.shape and not torch.equal(together, images)
    torch.testing.assert_close(together[1:2], change(images[1:2], uniform[1:2]))
    assert torch.autograd.gradcheck(lambda x: change(x, uniform), images.requires_grad_())


def test_colour_by_hand() -> None:
    """The middle draw changes nothing; saturation 0 is grey; contrast scales about the mean."""
    images = torch.rand(1, 3, 4, 4, dtype=F64)
    middle = torch.tensor([[0.5, 0.5, 0.5]])
    torch.testing.assert_close(Colour()(images, middle), images)
    brighter = Colour()(images, torch.tensor([[1.0, 0.5, 0.5]]))
    torch.testing.assert_close(brighter, images + 0.5)
    grey = Colour()(images, torch.tensor([[0.5, 0.0, 0.5]]))
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand_as(images))
    stronger = Colour()(images, torch.tensor([[0.5, 0.5, 1.0]]))
    torch.testing.assert_close(stronger.std(), 1.5 * images.std())
    torch.testing.assert_close(stronger.mean(), images.mean())


def test_translation_reaches_an_eighth_and_no_further() -> None:
    """Each shift of −2..2 of 16 pixels equally often; zeros come in."""
    images = torch.rand(1, 3, 16, 24) + 1
    padded = F.pad(images, (3, 3, 2, 2))
    seen = set()
    for down in torch.linspace(0, 0.999, 11):
        for across in torch.linspace(0, 0.999, 15):
            moved = Translation()(images, torch.stack([down, across])[None])
            dy, dx = int(down * 5) - 2, int(across * 7) - 3
            assert torch.equal(moved, padded[:, :, 2 - dy : 18 - dy, 3 - dx : 27 - dx])
            seen.add((dy, dx))
    assert len(seen) == 5 * 7


def test_cutout_takes_at_most_a_quarter() -> None:
    images = torch.ones(500, 3, 16, 12)
    gone = (Cutout()(images, torch.rand(500, 2)) == 0).all(1).flatten(1).sum(1)
    assert gone.max() == 8 * 6 and gone.min() >= 4 * 3
    assert (Cutout()(images, torch.rand(500, 2)) == 0).all(1).any(0).all()  # every pixel can go


def test_augment_takes_the_draws_of_each_whatever_the_others() -> None:
    images, uniform = torch.rand(2, 3, 16, 16), torch.rand(2, AUGMENTED_BY)
    assert augment(images, uniform, ()) is images
    assert torch.equal(augment(images, uniform, ["cutout"]), Cutout()(images, uniform[:, 5:7]))
    expected = Cutout()(Colour()(images, uniform[:, :3]), uniform[:, 5:7])
    assert torch.equal(augment(images, uniform, ["cutout", "colour"]), expected)


def test_plateau() -> None:
    """Windows of two steps: means 10, 8, 7.9 with a share of 5 % are a plateau at the third, and it stays one."""
    plateau = Plateau(0.05, 2)
    told = [plateau.add(torch.tensor(loss)) for loss in (11.0, 9.0, 8.0, 8.0, 7.9, 7.9, 1.0)]
    assert told == [False] * 5 + [True] * 2
    falling = Plateau(0.05, 1)
    assert not any(falling.add(torch.tensor(0.9**k)) for k in range(50))


def test_multi_scale_is_patch_discriminators_on_halved_images() -> None:
    torch.manual_seed(0)
    config = MultiScale(width=4, layers=2, scales=3)
    model, images = config.build(), torch.randn(2, 3, 64, 48)
    parts = maps(model(images))
    pyramid: list[Tensor] = [images, F.avg_pool2d(images, 2), F.avg_pool2d(images, 4)]
    for part, scale, picture in zip(parts, model.scales, pyramid, strict=True):
        torch.testing.assert_close(part, scale(picture))
    single = sum(p.numel() for p in PatchGAN(width=4, layers=2).build().parameters())
    assert sum(p.numel() for p in model.parameters()) == 3 * single
    assert config.smallest_image == 48
    with pytest.raises(ValueError, match="at least 48 pixels a side, got 47x64"):
        model(torch.zeros(1, 3, 47, 64))
    with pytest.raises(ValueError, match="at least 1 scale"):
        MultiScale(scales=0)


def test_the_smallest_image_is_enough_for_every_scale() -> None:
    for scales in (1, 2, 3):
        config = MultiScale(width=4, layers=1, scales=scales)
        parts = config.build()(torch.zeros(1, 3, config.smallest_image, config.smallest_image))
        assert parts[-1].shape[2:] == (1, 1)


def test_maps_of_a_single_map_is_that_map() -> None:
    logits = torch.randn(2, 1, 3, 3, dtype=torch.bfloat16)
    (only,) = maps(nn.Identity()(logits))
    assert only.dtype == torch.float32 and torch.equal(only, logits.float())
