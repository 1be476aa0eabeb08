"""ControlNet and T2I-adapter equal diffusers' independent ones, weights copied across; and their published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.controlnet import ControlNet, HintNetwork
from ldm.adapters.t2i import T2IAdapter
from ldm.backbones import UNet
from ldm.conditioning import Cond
from training.settings.decoding import load

diffusers = pytest.importorskip("diffusers")

TEXT: Any = None
SHAPE: dict[str, Any] = {
    "block_out_channels": (16, 32, 32), "layers_per_block": 2, "norm_num_groups": 8, "cross_attention_dim": 24,
    "attention_head_dim": 4, "transformer_layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
}  # fmt: skip


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def shaken(module: nn.Module) -> Any:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return module.eval()


def networks() -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = shaken(diffusers.UNet2DConditionModel(
        **SHAPE, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")))
    config = UNet(channels=(16, 32, 32), attention=(0, 1), heads=4, groups=8)
    ours = config.build(channels=4, context_dim=24, pooled_dim=None)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 16, 8), torch.tensor([1.0, 501.0]), torch.randn(2, 7, 24), torch.rand(2, 3, 128, 64)


def test_controlnet_equals_diffusers() -> None:
    base, unet = networks()
    theirs = shaken(diffusers.ControlNetModel(**SHAPE))
    branch = ControlNet(factor=8, hint_channels=3).build(base, TEXT)
    branch.load_state_dict(theirs.state_dict())
    x, level, context, hint = inputs()
    cond = Cond(context, torch.ones(2, 7, dtype=torch.bool), None, {"image": hint})
    with torch.no_grad():
        down, mid = theirs(x, level, context, hint, return_dict=False)
        for a, b in zip(branch.residuals(base, x, level, cond)["kept"], [*down, mid], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        wanted = unet(x, level, context, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        controlled, _ = branch.attach(base, TEXT)
        torch.testing.assert_close(controlled(x, level, cond), wanted, rtol=0, atol=1e-5)
        assert (wanted - base(x, level, cond)).abs().max() > 0.01


def test_t2i_adapter_equals_diffusers() -> None:
    base, unet = networks()
    theirs = diffusers.T2IAdapter(channels=[16, 32, 32], adapter_type="full_adapter", downscale_factor=8).eval()
    branch = T2IAdapter(factor=8, hint_channels=3).build(base, TEXT)
    branch.load_state_dict({name.removeprefix("adapter."): value for name, value in theirs.state_dict().items()})
    x, level, context, hint = inputs()
    cond = Cond(context, torch.ones(2, 7, dtype=torch.bool), None, {"image": hint})
    with torch.no_grad():
        maps = theirs(hint)
        wanted = unet(x, level, context, down_intrablock_additional_residuals=[part.clone() for part in maps]).sample
        controlled, _ = branch.attach(base, TEXT)
        torch.testing.assert_close(controlled(x, level, cond), wanted, rtol=0, atol=1e-5)
        assert (wanted - base(x, level, cond)).abs().max() > 0.01


def test_published_sizes_and_keys() -> None:
    with torch.device("meta"):
        base = UNet().build(channels=4, context_dim=768)
        branch: Any = ControlNet(factor=8, hint_channels=3).build(base, TEXT)
        theirs = diffusers.ControlNetModel(cross_attention_dim=768)
        pyramid: Any = T2IAdapter(factor=8, hint_channels=3).build(base, TEXT)
        published = diffusers.T2IAdapter(channels=[320, 640, 1280, 1280], adapter_type="full_adapter")
    assert count(base) == 859_520_964
    assert count(branch) == 361_279_120
    assert count(branch.controlnet_down_blocks) + count(branch.controlnet_mid_block) == 11_479_680
    assert len(branch.controlnet_down_blocks) == 12
    assert count(branch.controlnet_cond_embedding) == 1_086_480
    shapes = {name: p.shape for name, p in theirs.state_dict().items()}
    assert {name: p.shape for name, p in branch.state_dict().items()} == shapes
    assert {name: p.shape for name, p in pyramid.state_dict().items()} == {
        name.removeprefix("adapter."): p.shape for name, p in published.state_dict().items()}
    assert count(pyramid) == 77_369_280


@pytest.mark.parametrize(("config", "copied", "zeros", "layers"), [
    ("shapes", 2_172_352, 45_504, 5), ("fashion", 2_904_320, 66_176, 7), ("quickstart", 2_172_352, 45_504, 5),
    ("emoji-unet", 1_661_376, 37_344, 7),
])  # fmt: skip
def test_sizes_on_our_own_bases(config: str, copied: int, zeros: int, layers: int) -> None:
    """With text 128 wide, whatever the config's."""
    settings: Any = load("denoiser", config, {})
    with torch.device("meta"):
        base = settings.backbone.build(channels=4, context_dim=128, pooled_dim=128)
        branch: Any = ControlNet(factor=4, hint_channels=1).build(base, TEXT)
    spoken = nn.ModuleList([*branch.controlnet_down_blocks, branch.controlnet_mid_block])
    assert (count(spoken), len(spoken)) == (zeros, layers)
    assert count(branch) - count(spoken) - count(branch.controlnet_cond_embedding) == copied


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("patch", [0, 1, 2])
def test_the_hint_network_ends_at_the_size_of_the_latents(factor: int, patch: int) -> None:
    network = HintNetwork(3, 24, factor, patch)
    assert network(torch.rand(1, 3, 4 * factor, 6 * factor)).shape == (1, 24, 4 // (patch or 1), 6 // (patch or 1))
    assert not network(torch.rand(1, 3, 2 * factor, 2 * factor)).any()


@pytest.mark.parametrize(("factor", "least"), [(1, 0.12), (4, 0.03), (8, 0.012)])
def test_a_hint_does_not_fade_in_its_network(factor: int, least: float) -> None:
    """How far features differ from place to place, before the layer that is 0: the outline of a square, of 1."""
    torch.manual_seed(0)
    network, hint, side = HintNetwork(1, 24, factor), torch.zeros(1, 1, 32, 32), slice(8, 24)
    hint[..., 8, side] = hint[..., 23, side] = hint[..., side, 8] = hint[..., side, 23] = 1
    network.conv_out = nn.Identity()
    assert network(hint).std(dim=(2, 3)).pow(2).mean().sqrt() > least
