"""diffusers' classes of denoisers against ours: outputs of one call, both ways, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import peers
import pytest
import torch
from donors import network as peer
from torch import Tensor, nn

from ldm.backbones import DiT, UNet
from ldm.conditioning import Cond
from training.errors import UserError
from training.exchange.denoiser_layouts import LAYOUTS
from training.exchange.layout import Network

diffusers = peers.diffusers
PIXART: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2, "cross_attention_dim": 32,
    "sample_size": 8, "caption_channels": 24, "use_additional_conditions": False, "interpolation_scale": 1,
}  # fmt: skip
DIT: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8,
                       "num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 5, "norm_eps": 1e-6}  # fmt: skip
UNET: dict[str, Any] = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 24,
    "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "sample_size": 8,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("UNet2DConditionModel", UNET),
    "unet, heads a level": ("UNet2DConditionModel", UNET | {"attention_head_dim": (2, 4), "use_linear_projection": True,
                                                            "transformer_layers_per_block": 2, "out_channels": 8}),
    "unet, pooled": ("UNet2DConditionModel", UNET | {"class_embed_type": "projection", "layers_per_block": 2,
                                                     "projection_class_embeddings_input_dim": 20,
                                                     "resnet_time_scale_shift": "scale_shift"}),
    "pixart": ("PixArtTransformer2DModel", PIXART),
    "pixart, scaled": ("PixArtTransformer2DModel", PIXART | {"interpolation_scale": 2, "out_channels": 4,
                                                             "patch_size": 1}),
    "pixart, its own scale": ("PixArtTransformer2DModel", PIXART | {"interpolation_scale": None, "out_channels": None}),
    "dit": ("DiTTransformer2DModel", DIT),
    "dit, one variance": ("DiTTransformer2DModel", DIT | {"out_channels": None, "patch_size": 4}),
}  # fmt: skip


def about(network: Any) -> dict[str, Any]:
    """Its config.json as a reader is given it."""
    return dict(json.loads(network.to_json_string()))


def read(name: str, settings: dict[str, Any]) -> tuple[Any, Network]:
    network = peer(name, settings)
    return network, LAYOUTS[name].read(about(network), {k: v.clone() for k, v in network.state_dict().items()})


def built(network: Network) -> nn.Module:
    """Ours, filled with every tensor and no other."""
    settings = {key: value for key, value in network.backbone.items() if key != "kind"}
    config = {"unet": UNet, "dit": DiT}[network.backbone["kind"]](**settings)
    model: nn.Module = config.build(
        channels=network.channels, context_dim=network.context_dim, pooled_dim=network.pooled_dim
    )
    model.load_state_dict(network.tensors)
    return model.eval()


def answers(name: str, theirs: Any, ours: nn.Module, network: Network) -> tuple[Tensor, Tensor]:
    """One call of both: three pictures, masked captions and, of a DiT, the null class."""
    draw = torch.Generator().manual_seed(3)
    x, level = torch.randn(3, 4, 8, 8, generator=draw), torch.tensor([0.0, 501.0, 999.0])
    context = torch.randn(3, 7, max(network.context_dim, 1), generator=draw)
    mask = torch.arange(7)[None] < torch.tensor([7, 1, 4])[:, None]
    if network.labels is not None:
        classes = torch.tensor([0, 4, 5])  # the last is diffusers' null
        wanted = theirs(x, level, classes).sample
        return wanted, ours(x, level, Cond(context, mask, network.labels[torch.tensor([1, 5, 0])]))
    vector = torch.randn(3, network.pooled_dim or 1, generator=draw)
    told: dict[str, Any] = {"class_labels": vector} if network.pooled_dim else {}
    wanted = theirs(x, encoder_hidden_states=context, timestep=level, encoder_attention_mask=mask, **told).sample
    return wanted, ours(x, level, Cond(context, mask, vector if network.pooled_dim else None))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_one_call_is_equal(case: str) -> None:
    name, settings = CASES[case]
    theirs, network = read(name, settings)
    wanted, got = answers(name, theirs, built(network), network)
    assert wanted.std() > 0.01
    torch.testing.assert_close(got / wanted.std(), wanted / wanted.std(), atol=1e-5, rtol=0)
    assert network.size == 8


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_was_read(case: str) -> None:
    """Every tensor as it was, and a config of which diffusers builds the same network."""
    name, settings = CASES[case]
    theirs, network = read(name, settings)
    config, tensors = LAYOUTS[name].write(network)
    again = getattr(diffusers, name).from_config(json.loads(json.dumps(config))).eval()
    again.load_state_dict(tensors)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in theirs.state_dict().items())
    wanted, same = (answers(name, one, built(network), network)[0] for one in (theirs, again))
    torch.testing.assert_close(same, wanted, atol=0, rtol=0)
    assert len({value.untyped_storage().data_ptr() for value in tensors.values()}) == len(tensors)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "sdxl": ("UNet2DConditionModel", {"addition_embed_type": "text_time"}, "addition_embed_type"),
    "depths": ("UNet2DConditionModel", {"transformer_layers_per_block": [1, 2, 9, 9]}, "transformer_layers_per_block"),
    "heads": ("UNet2DConditionModel", {"attention_head_dim": [5, 9, 20, 20]}, "attention_head_dim"),
    "inpainting": ("UNet2DConditionModel", {"in_channels": 9}, "9 channels in and 4 out"),
    "classes": ("UNet2DConditionModel", {"class_embed_type": "timestep"}, "class_embed_type"),
    "numbers of classes": ("UNet2DConditionModel", {"num_class_embeds": 10}, "num_class_embeds"),
    "blocks": ("UNet2DConditionModel", {"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
    "time": ("UNet2DConditionModel", {"freq_shift": 1}, "freq_shift = 1"),
    "act": ("UNet2DConditionModel", {"act_fn": "gelu"}, "act_fn"),
    "additional": ("PixArtTransformer2DModel", {"use_additional_conditions": True}, "use_additional_conditions"),
    "additional unsaid": ("PixArtTransformer2DModel", {"sample_size": 128}, "use_additional_conditions"),
    "no captions": ("PixArtTransformer2DModel", {"sample_size": 64}, "caption_channels"),
    "geglu": ("PixArtTransformer2DModel", {"activation_fn": "geglu"}, "activation_fn"),
    "bias": ("DiTTransformer2DModel", {"attention_bias": False}, "attention_bias"),
    "eps": ("DiTTransformer2DModel", {"norm_eps": 0.1}, "norm_eps"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_another_network_is_refused_by_name(case: str) -> None:
    name, settings, said = REFUSED[case]
    with pytest.raises(UserError, match="has no counterpart here") as refused:
        LAYOUTS[name].read(settings, {})
    assert said in refused.value.what and refused.value.hint


def test_missing_and_left_over_tensors_are_named() -> None:
    theirs = peer("PixArtTransformer2DModel", PIXART).state_dict()
    whole = {key: value for key, value in theirs.items() if key != "transformer_blocks.1.attn1.to_k.bias"}
    reader, settings = LAYOUTS["PixArtTransformer2DModel"].read, PIXART | {"out_channels": 8}
    with pytest.raises(UserError, match="tensor transformer_blocks.1.attn1.to_k.bias is missing"):
        reader(settings, whole)
    with pytest.raises(UserError, match="tensor extra and 1 more has no counterpart"):
        reader(settings, theirs | {"extra": torch.zeros(1), "other": torch.zeros(1)})
    reader(settings, theirs | {"caption_projection.y_embedding": torch.zeros(1)})


def test_embedders_of_a_dit_must_be_one() -> None:
    """Each block of diffusers' has its own; where they differ, as after a training there, nothing here is equal."""
    theirs = peer("DiTTransformer2DModel", DIT).state_dict()
    for part in ("timestep_embedder.linear_1.bias", "class_embedder.embedding_table.weight"):
        key = f"transformer_blocks.2.norm1.emb.{part}"
        with pytest.raises(UserError, match="another than block 0's"):
            LAYOUTS["DiTTransformer2DModel"].read(DIT, theirs | {key: theirs[key] + 1})
        with pytest.raises(UserError, match="is missing"):
            LAYOUTS["DiTTransformer2DModel"].read(DIT, {k: v for k, v in theirs.items() if k != key})


NOT_WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "position": ("unet", {"position": True}), "swiglu": ("pixart", {"mlp": "swiglu"}),
    "qk_norm": ("pixart", {"qk_norm": True}), "pooled": ("pixart", {"pooled": True}),
    "conditioning": ("pixart", {"conditioning": "adaln-zero"}), "frequency_shift": ("dit", {"frequency_shift": 0.0}),
    "mlp_ratio": ("dit", {"mlp_ratio": 2.0}), "pooled_projection": ("dit", {"pooled_projection": True}),
    "base_size": ("dit", {"base_size": 16}), "cross_norm": ("pixart", {"cross_norm": True}),
}  # fmt: skip


@pytest.mark.parametrize("said", NOT_WRITTEN)
def test_what_diffusers_has_not_is_refused_by_name(said: str) -> None:
    kind, change = NOT_WRITTEN[said]
    name, settings = CASES[kind]
    _, network = read(name, settings)
    plain = {"norm": "layer", "position": "sincos", "qk_norm": False, "mlp_ratio": 4.0} if kind != "unet" else {}
    changed = Network(**{**vars(network), "backbone": plain | network.backbone | change})
    with pytest.raises(UserError, match="has no counterpart in diffusers") as refused:
        LAYOUTS[name].write(changed)
    assert said in refused.value.what


def test_settings_that_are_not_known_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = peer("PixArtTransformer2DModel", PIXART)
    LAYOUTS["PixArtTransformer2DModel"].read(about(theirs) | {"new_thing": 3, "dropout": 0.1}, theirs.state_dict())
    assert "ignored in config.json, as not known here: new_thing\n" in capsys.readouterr().err
