"""Equality of our U-Net and DiT with diffusers' independent ones, weights copied across."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ldm.backbones import DiT, UNet
from ldm.backbones.embed import sincos_table, sinusoid
from ldm.backbones.unet_blocks import SpatialTransformer
from ldm.conditioning import Cond, Share

diffusers = pytest.importorskip("diffusers")

PIXART_KEYS = (
    (r"^patch_embedding", "pos_embed.proj"),
    (r"^time_embedding", "adaln_single.emb.timestep_embedder"),
    (r"^shared\.linear", "adaln_single.linear"),
    (r"^modulation\.table", "scale_shift_table"),
    (r"^out\.", "proj_out."),
    (r"^blocks", "transformer_blocks"),
    (r"modulation\.table", "scale_shift_table"),
    (r"\.attention\.", ".attn1."),
    (r"\.cross\.", ".attn2."),
    (r"(attn\d)\.q\.", r"\1.to_q."),
    (r"(attn\d)\.out\.", r"\1.to_out.0."),
    (r"mlp\.inner", "ff.net.0.proj"),
    (r"mlp\.out", "ff.net.2"),
)


def from_pixart(ours: nn.Module, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' PixArt weights under our names; q, k and v fused."""

    def of(name: str) -> Tensor:
        for pattern, replacement in PIXART_KEYS:
            name = re.sub(pattern, replacement, name)
        fused = re.search(r"\.(qkv|kv)\.", name)
        if fused is None:
            return theirs[name].flatten(1) if name == "pos_embed.proj.weight" else theirs[name]
        return torch.cat([theirs[name.replace(fused[0], f".to_{letter}.")] for letter in fused[1]])

    return {name: of(name) for name in ours.state_dict()}


def test_pixart_has_the_published_size() -> None:
    with torch.device("meta"):
        theirs = diffusers.PixArtTransformer2DModel(sample_size=64, caption_channels=4096)
        ours = DiT(
            width=1152, depth=28, heads=16, mlp="gelu-tanh", conditioning="adaln-single", cross_norm=False,
            pooled=False, base_size=64, learned_variance=True,
        ).build(channels=4, context_dim=4096)  # fmt: skip
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 610_856_096


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (12, 8)])
def test_dit_equals_pixart(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    theirs = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=8, patch_size=2, caption_channels=24, use_additional_conditions=False,
    ).eval()  # fmt: skip
    ours = DiT(
        width=32, depth=2, heads=4, mlp="gelu-tanh", conditioning="adaln-single", cross_norm=False, pooled=False,
        base_size=8, learned_variance=True,
    ).build(channels=4, context_dim=24)  # fmt: skip
    ours.load_state_dict(from_pixart(ours, theirs.state_dict()))
    x, level, context = torch.randn(3, 4, *size), torch.tensor([0.0, 501.0, 999.0]), torch.randn(3, 7, 24)
    mask = torch.arange(7)[None] < torch.tensor([7, 1, 4])[:, None]
    with torch.no_grad():
        wanted = theirs(x, context, level, encoder_attention_mask=mask, return_dict=False)[0]
        torch.testing.assert_close(ours(x, level, Cond(context, mask, None)), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_unet_equals_diffusers(linear: bool, pooled: bool, scale_shift: bool) -> None:
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8, cross_attention_dim=24,
        attention_head_dim=4, use_linear_projection=linear, transformer_layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        class_embed_type="projection" if pooled else None, projection_class_embeddings_input_dim=20 if pooled else None,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
    ).eval()  # fmt: skip
    ours = UNet(
        channels=(16, 32, 32), attention=(0, 1), heads=4, depth=2, groups=8, linear_projection=linear, pooled=pooled,
        scale_shift=scale_shift,
    ).build(channels=4, context_dim=24, pooled_dim=20)  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    x, level, context = torch.randn(3, 4, 16, 8), torch.tensor([0.0, 501.0, 999.0]), torch.randn(3, 7, 24)
    mask, vector = torch.arange(7)[None] < torch.tensor([7, 1, 4])[:, None], torch.randn(3, 20)
    with torch.no_grad():
        wanted = theirs(x, level, context, encoder_attention_mask=mask, class_labels=vector if pooled else None).sample
        torch.testing.assert_close(ours(x, level, Cond(context, mask, vector)), wanted, rtol=0, atol=1e-5)


def test_position_table_tells_places_apart() -> None:
    """The first features differ by the table, whose 64 places are all different; and it costs no key."""
    torch.manual_seed(0)
    config = UNet(channels=(16, 16), attention=(), heads=4, groups=8, position=True)
    with_table, without = (c.build(channels=4, context_dim=8) for c in (config, replace(config, position=False)))
    without.load_state_dict(with_table.state_dict())
    seen: list[torch.Tensor] = []
    for network in (with_table, without):
        network.down_blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        cond = Cond(torch.zeros(1, 2, 8), torch.ones(1, 2, dtype=torch.bool))
        network(torch.zeros(1, 4, 8, 8), torch.tensor([10.0]), cond)
    table = (seen[0] - seen[1])[0].flatten(1).T
    torch.testing.assert_close(table, sincos_table(16, 8, 8, 32.0, torch.device("cpu")), rtol=0, atol=1e-6)
    assert len(torch.unique(table, dim=0)) == 64


def test_query_position_joins_what_is_asked_of_the_text_alone() -> None:
    """Against the same layer written out: the table is in the queries of cross-attention and nowhere else."""
    torch.manual_seed(0)
    block = SpatialTransformer(16, 8, heads=2, depth=1, groups=4, linear=True, query_position=True)
    nn.init.normal_(block.proj_out.weight, std=0.3)
    layer = block.transformer_blocks[0]
    x, context = torch.randn(2, 16, 4, 6), torch.randn(2, 5, 8)
    tokens = block.proj_in(block.norm(x).flatten(2).transpose(1, 2))
    y = layer.norm1(tokens)
    tokens = tokens + layer.attn1(y, y, None, "")
    asked = layer.norm2(tokens) + sincos_table(16, 4, 6, 32.0, torch.device("cpu"))
    tokens = tokens + layer.attn2(asked, context, None, "")
    tokens = tokens + layer.ff["net"](layer.norm3(tokens))
    wanted = x + block.proj_out(tokens).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(block(x, context, None, Share()), wanted)
    block.query_position = False
    assert not torch.allclose(block(x, context, None, Share()), wanted)


def test_stable_diffusion_keys_and_shapes() -> None:
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(cross_attention_dim=768).state_dict()
        ours = UNet().build(channels=4, context_dim=768).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_embeddings_equal_diffusers() -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding

    levels = torch.tensor([0.0, 0.3, 501.0, 999.0])
    wanted = get_timestep_embedding(levels, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(sinusoid(levels, 256), wanted, rtol=0, atol=1e-6)
    wanted = get_2d_sincos_pos_embed(64, (6, 6), base_size=4)
    torch.testing.assert_close(sincos_table(64, 6, 6, 4.0, torch.device("cpu")), wanted.float(), rtol=0, atol=1e-6)
