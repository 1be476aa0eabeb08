"""Backbones that read an image condition: as before at first, bit for bit; then by it, and never without it."""

from __future__ import annotations

import pytest
import torch
from test_backbones import CHANNELS, CONTEXT, POOLED, SMALL, build, inputs
from torch import Tensor

from ldm.backbones import Backbone
from ldm.conditioning import Cond

MORE = 3


@pytest.fixture(params=SMALL)
def plain(request: pytest.FixtureRequest) -> Backbone:
    """Shaken, so that its answers are not the zeros that it begins with."""
    return build(SMALL[request.param])


def extended(plain: Backbone, config: str, *, level: bool = True) -> Backbone:
    """Another of its config that reads an image too, with its weights where it has them."""
    wide = SMALL[config].build(channels=CHANNELS, context_dim=CONTEXT, pooled_dim=POOLED).double()
    wide.load_state_dict(plain.state_dict())
    return wide.shown(MORE, level).double()


def shown(cond: Cond, size: tuple[int, int] = (8, 8), seed: int = 2) -> Cond:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(len(cond.mask), MORE, *size, generator=generator, dtype=torch.float64)
    return cond._replace(extras={"image": image, "image_level": torch.rand(len(cond.mask), generator=generator)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", SMALL)
def test_an_extended_network_answers_as_the_plain_one_bit_for_bit(config: str, dtype: torch.dtype) -> None:
    plain, (x, level, cond) = build(SMALL[config]), inputs()
    wide = extended(plain, config).to(dtype)
    expected = plain.to(dtype)(x, level, cond)
    assert expected.abs().amax() > 0.1
    assert torch.equal(wide(x, level, shown(cond)), expected)


@pytest.mark.parametrize("config", SMALL)
def test_built_with_an_image_it_has_the_weights_of_one_built_without(config: str) -> None:
    def made(**image: int | bool) -> dict[str, Tensor]:
        torch.manual_seed(5)
        sizes = {"channels": CHANNELS, "context_dim": CONTEXT, "pooled_dim": POOLED}
        return dict(SMALL[config].build(**sizes, **image).state_dict())

    plain, wide = made(), made(image_channels=MORE, image_level=True)
    (new,) = [name for name in plain if plain[name].shape != wide[name].shape]
    assert new in ("conv_in.weight", "patch_embedding.weight")
    own = plain[new].shape[1]
    assert torch.equal(wide[new][:, :own], plain[new]) and not wide[new][:, own:].any()
    assert all(torch.equal(wide[name], plain[name]) for name in plain if name != new)
    assert {name.split(".")[0] for name in wide.keys() - plain.keys()} == {"level_embedding"}


@pytest.mark.parametrize("config", SMALL)
def test_the_new_weights_learn_from_the_first_step_on(config: str) -> None:
    wide, (x, level, cond) = extended(build(SMALL[config]), config), inputs()
    before = wide(x, level, shown(cond))
    before.square().sum().backward()
    layer = getattr(wide, wide.input_layer)
    assert layer.weight.grad[:, layer.own :].abs().amax(1).all()
    last = wide.level_embedding.projection.linear_2
    assert last.weight.grad.any() and last.bias.grad.any()
    with torch.no_grad():
        for parameter in (layer.weight, last.weight):
            parameter -= 0.01 * parameter.grad
    told = wide(x, level, shown(cond))
    assert not torch.equal(told, before)
    assert not torch.equal(wide(x, level, shown(cond, seed=3)), told)
    other = shown(cond)
    other.extras["image_level"].mul_(0.5)
    assert not torch.equal(wide(x, level, other), told)


@pytest.mark.parametrize("config", ["dit", "unet"])
def test_a_wide_layer_is_one_layer_over_all_its_inputs(config: str) -> None:
    """As published models with more inputs are read: the image's channels stand behind the latents'."""
    wide, (x, _, cond) = extended(build(SMALL[config]), config, level=False), inputs()
    layer, cond = getattr(wide, wide.input_layer), shown(cond)
    torch.nn.init.normal_(layer.weight)
    assert cond.image is not None
    joint, patch = wide.joined(x, cond), getattr(wide.config, "patch", 0)
    if patch:
        joint = torch.nn.functional.unfold(joint, patch, stride=patch).transpose(1, 2)
        one = torch.nn.Linear(*reversed(layer.weight.shape)).double()
    else:
        one = torch.nn.Conv2d(layer.weight.shape[1], layer.weight.shape[0], 3, padding=1).double()
    one.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(joint), one(joint), rtol=0, atol=1e-12)
    both = wide.joined(x, cond)
    assert torch.equal(both[:, :CHANNELS], x) and torch.equal(both[:, CHANNELS:], cond.image)


def test_levels_are_not_rounded_with_the_image() -> None:
    """0.501 and 0.5 are one number in bfloat16; as levels they are two."""
    wide, (x, level, cond) = extended(build(SMALL["unet"]), "unet").bfloat16(), inputs()
    torch.nn.init.normal_(wide.level_embedding.projection.linear_2.weight)
    one, two = shown(cond), shown(cond)
    one.extras["image_level"].fill_(0.5)
    two.extras["image_level"].fill_(0.501)
    assert not torch.equal(wide(x, level, one), wide(x, level, two))


def test_what_is_missing_or_of_another_size_is_named() -> None:
    wide, (x, level, cond) = extended(build(SMALL["unet"]), "unet"), inputs()
    with pytest.raises(ValueError, match=r"extra 'image' is missing \(given: none\)"):
        wide(x, level, cond)
    full = shown(cond)
    with pytest.raises(ValueError, match=r"extra 'image_level' is missing \(given: image\)"):
        wide(x, level, full._replace(extras={"image": full.extras["image"]}))
    with pytest.raises(ValueError, match="extra 'image' is 3x3x4x4, the backbone reads 3x3x8x8"):
        wide(x, level, shown(cond, size=(4, 4)))
    with pytest.raises(ValueError, match="extra 'image_level' is 2, the backbone reads 3"):
        wide(x, level, full._replace(extras={**full.extras, "image_level": torch.ones(2)}))
    plain = build(SMALL["unet"])
    assert torch.equal(plain(x, level, full), plain(x, level, cond))  # which reads none


def test_a_backbone_without_an_input_layer_refuses() -> None:
    network = build(SMALL["unet"])
    network.input_layer = "nothing"  # type: ignore[misc]
    with pytest.raises(ValueError, match="reads no image condition"):
        network.shown(3)
