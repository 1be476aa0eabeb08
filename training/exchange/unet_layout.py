"""diffusers' UNet2DConditionModel, read and written. Its tensors are called as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.exchange.layout import (
    IN_DIFFUSERS,
    Network,
    Settings,
    Tensors,
    expect,
    foreign,
    learned_variance,
    settings,
)

CROSS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
# Settings of each class, as diffusers has them where config.json is silent: what is read, and the only value that is.
UNET = {"sample_size": None, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "layers_per_block": 2, "norm_num_groups": 32,
        "cross_attention_dim": 1280, "transformer_layers_per_block": 1, "attention_head_dim": 8,
        "use_linear_projection": False, "class_embed_type": None, "resnet_time_scale_shift": "default",
        "projection_class_embeddings_input_dim": None, "time_embedding_dim": None}  # fmt: skip
UNET_FIXED = {"center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "act_fn": "silu",
              "mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False, "downsample_padding": 1,
              "mid_block_scale_factor": 1, "norm_eps": 1e-5, "dual_cross_attention": False,
              "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional",
              "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default",
              "class_embeddings_concat": False}  # fmt: skip
# Each of them null: parts that networks have here by other means, or not at all.
UNET_NULL = ("num_attention_heads", "encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type",
             "num_class_embeds", "reverse_transformer_layers_per_block", "time_embedding_act_fn", "timestep_post_act",
             "time_cond_proj_dim", "cross_attention_norm")  # fmt: skip


def _one(name: str, values: Any, levels: list[int]) -> Any:
    """A setting for all levels, or one for each: that of those that count. Raises UserError where they differ."""
    of_levels = [values[i] for i in levels] if isinstance(values, list | tuple) else [values]
    if any(value != of_levels[0] for value in of_levels):
        raise foreign(f"{name} = {values!r}", "one for all levels is read")
    return of_levels[0]


def read(about: Mapping[str, Any], tensors: Tensors) -> Network:
    said = settings(about, UNET, UNET_FIXED, UNET_NULL)
    channels, widths, down = said["in_channels"], said["block_out_channels"], said["down_block_types"]
    if odd := {*down, *said["up_block_types"]} - {*CROSS}:
        raise foreign(f"block type {sorted(odd)[0]}", f"known: {', '.join(CROSS)}")
    if [CROSS[kind] for kind in down] != [CROSS[kind] for kind in reversed(said["up_block_types"])]:
        raise foreign("attention at other levels on the way up than on the way down", "both must be alike")
    if said["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise foreign(f"time_embedding_dim = {said['time_embedding_dim']}", f"only {4 * widths[0]} is read")
    if said["class_embed_type"] not in (None, "projection"):
        raise foreign(f"class_embed_type = {said['class_embed_type']!r}", "projection is read, or none")
    if said["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        raise foreign(f"resnet_time_scale_shift = {said['resnet_time_scale_shift']!r}", "default, scale_shift are read")
    pooled = said["class_embed_type"] is not None
    attention = [level for level, kind in enumerate(down) if CROSS[kind]]
    counted = [*attention, len(widths) - 1]
    backbone = {"kind": "unet", "channels": list(widths), "attention": attention, "pooled": pooled,
                "blocks": _one("layers_per_block", said["layers_per_block"], list(range(len(widths)))),
                **_heads(said["attention_head_dim"], widths, counted), "groups": said["norm_num_groups"],
                "depth": _one("transformer_layers_per_block", said["transformer_layers_per_block"], counted),
                "linear_projection": said["use_linear_projection"],
                "scale_shift": said["resnet_time_scale_shift"] == "scale_shift",
                "learned_variance": learned_variance(channels, said["out_channels"])}  # fmt: skip
    return Network(backbone=backbone, tensors=tensors, channels=channels, size=_side(said["sample_size"]),
                   context_dim=_one("cross_attention_dim", said["cross_attention_dim"], counted),
                   pooled_dim=said["projection_class_embeddings_input_dim"] if pooled else None)  # fmt: skip


def _side(size: Any) -> int:
    """sample_size as one number; 64 where config.json has none."""
    return int(size if isinstance(size, int | float) else size[0] if size else 64)


def _heads(said: Any, widths: list[int], levels: list[int]) -> Settings:
    """diffusers' `attention_head_dim` is the number of heads (its issue 2011): one, or one a level."""
    heads = {level: said[level] if isinstance(said, list | tuple) else said for level in levels}
    if len(set(heads.values())) == 1:
        return {"heads": heads[levels[0]], "head_dim": 0}
    if len(dims := {widths[level] / count for level, count in heads.items()}) > 1:
        raise foreign(f"attention_head_dim = {said!r}", "as many heads at each level have, or as many channels a head")
    return {"head_dim": int(dims.pop())}


def write(network: Network) -> tuple[Settings, Tensors]:
    ours, widths = network.backbone, network.backbone["channels"]
    expect(ours, {"position": False}, IN_DIFFUSERS)
    there = [level in ours["attention"] for level in range(len(widths))]
    heads = [width // ours["head_dim"] for width in widths] if ours["head_dim"] else ours["heads"]
    said = {"sample_size": network.size, "in_channels": network.channels,
            "out_channels": network.channels * (2 if ours["learned_variance"] else 1), "block_out_channels": widths,
            "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in there],
            "up_block_types": ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(there)],
            "layers_per_block": ours["blocks"], "norm_num_groups": ours["groups"], "attention_head_dim": heads,
            "cross_attention_dim": network.context_dim, "transformer_layers_per_block": ours["depth"],
            "use_linear_projection": ours["linear_projection"],
            "class_embed_type": "projection" if ours["pooled"] else None,
            "projection_class_embeddings_input_dim": network.pooled_dim if ours["pooled"] else None,
            "resnet_time_scale_shift": "scale_shift" if ours["scale_shift"] else "default"}  # fmt: skip
    return UNET_FIXED | said, dict(network.tensors)
