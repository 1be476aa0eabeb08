"""diffusers' PixArtTransformer2DModel and DiTTransformer2DModel, read and written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.backbones import DiT
from training.errors import CHECKPOINT, UserError
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
from training.messages import note

DIT = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None, "num_layers": 28,
       "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_eps": 1e-5,
       "activation_fn": "gelu-approximate"}  # fmt: skip
PIXART = DIT | {"out_channels": 8, "cross_attention_dim": 1152, "sample_size": 128, "interpolation_scale": None,
                "use_additional_conditions": None, "caption_channels": None, "norm_eps": 1e-6}  # fmt: skip
DIT_FIXED = {"attention_bias": True, "norm_elementwise_affine": False, "norm_type": "ada_norm_zero"}
PIXART_FIXED = DIT_FIXED | {"norm_type": "ada_norm_single", "attention_type": "default"}
# Of the one class that both were before diffusers 0.29.
OLDER_FIXED = {"double_self_attention": False, "only_cross_attention": False, "attention_type": "default"}
# Of activation_fn "gelu" with a projected text.
GELU = "the text's projection is tanh GELU in diffusers and exact GELU here: outputs differ by about 3e-4"
# Stored by older files: a table that is computed, and the learned null that pipelines have no use for.
NOT_READ = ("pos_embed.pos_embed", "caption_projection.y_embedding")
# What of `[backbone]` each class can be.
OURS = {"mlp_ratio": 4.0, "qk_norm": False, "norm": "layer", "position": "sincos"}
PIXART_OURS = {"conditioning": "adaln-single", "text": "cross", "cross_norm": False, "pooled": False,
               "frequency_shift": 0.0} | OURS  # fmt: skip
DIT_OURS = {"conditioning": "adaln-zero", "text": "none", "pooled": True, "pooled_projection": False,
            "frequency_shift": 1.0} | OURS  # fmt: skip
# Our names -> diffusers', in this order; a fused projection is several of theirs, one below the other.
SHARED_KEYS = ((r"^patch_embedding\.", "pos_embed.proj."), (r"^blocks\.", "transformer_blocks."),
               (r"\.attention\.", ".attn1."), (r"\.cross\.", ".attn2."), (r"(attn\d)\.q\.", r"\1.to_q."),
               (r"(attn\d)\.out\.", r"\1.to_out.0."), (r"\.mlp\.inner\.", ".ff.net.0.proj."),
               (r"\.mlp\.out\.", ".ff.net.2."))  # fmt: skip
PIXART_KEYS = (*SHARED_KEYS, (r"^time_embedding\.", "adaln_single.emb.timestep_embedder."),
               (r"^shared\.linear\.", "adaln_single.linear."), (r"(^|\.)modulation\.table$", r"\1scale_shift_table"),
               (r"^out\.", "proj_out."))  # fmt: skip
FIRST = "transformer_blocks.0.norm1.emb."  # where a class-conditional DiT keeps what every block repeats
DIT_KEYS = (*SHARED_KEYS, (r"^time_embedding\.", f"{FIRST}timestep_embedder."),
            (r"^modulation\.linear\.", "proj_out_1."), (r"\.modulation\.linear\.", ".norm1.linear."),
            (r"^out\.", "proj_out_2."))  # fmt: skip
CLASSES = f"{FIRST}class_embedder.embedding_table.weight"


def _shared(said: Settings) -> Settings:
    """What DiT and PixArt say alike of `[backbone]`. Raises UserError where it is another network."""
    if said["activation_fn"] not in ("gelu-approximate", "gelu"):
        raise foreign(f"activation_fn = {said['activation_fn']!r}", "gelu-approximate and gelu are read")
    if said["norm_eps"] not in (1e-5, 1e-6):
        raise foreign(f"norm_eps = {said['norm_eps']!r}", "1e-06 is read")
    if said["norm_eps"] != 1e-6:
        note(f"norm_eps is {said['norm_eps']:g} in front of the MLPs of the source, 1e-06 here")
    return {"kind": "dit", "width": said["num_attention_heads"] * said["attention_head_dim"],
            "depth": said["num_layers"], "heads": said["num_attention_heads"], "patch": said["patch_size"],
            "mlp": "gelu-tanh" if said["activation_fn"] == "gelu-approximate" else "gelu",
            "learned_variance": learned_variance(said["in_channels"], said["out_channels"])}  # fmt: skip


def _shared_written(network: Network) -> Settings:
    """The other way. Raises UserError for networks that neither of the classes is."""
    ours = network.backbone
    if ours["mlp"] == "swiglu":
        raise foreign("mlp = 'swiglu'", "gelu-tanh and gelu have", IN_DIFFUSERS)
    return {
        "num_attention_heads": ours["heads"], "attention_head_dim": ours["width"] // ours["heads"],
        "in_channels": network.channels, "num_layers": ours["depth"], "patch_size": ours["patch"], "norm_eps": 1e-6,
        "out_channels": network.channels * (2 if ours["learned_variance"] else 1), "sample_size": network.size,
        "activation_fn": "gelu-approximate" if ours["mlp"] == "gelu-tanh" else "gelu", "num_embeds_ada_norm": 1000,
    }  # fmt: skip


def read_pixart(about: Mapping[str, Any], tensors: Tensors) -> Network:
    said = settings(about, PIXART, OLDER_FIXED | PIXART_FIXED)
    backbone = _shared(said)
    extra, size = said["use_additional_conditions"], said["sample_size"]
    if extra or (extra is None and size == 128):
        what = "use_additional_conditions (resolution and aspect ratio told to the network)"
        raise foreign(what, "PixArt-Sigma and PixArt-alpha of 256 and 512 pixels are read")
    if said["caption_channels"] is None:
        raise foreign("caption_channels = null", "networks that project the text's features are read")
    if said["cross_attention_dim"] != backbone["width"]:
        raise foreign(f"cross_attention_dim = {said['cross_attention_dim']}", f"only {backbone['width']} is read")
    base = size / (said["interpolation_scale"] or max(size // 64, 1))
    if base != int(base):
        raise foreign(f"sample_size {size} by interpolation_scale {said['interpolation_scale']}", "the ratio is whole")
    if backbone["mlp"] == "gelu":
        note(GELU)
    backbone |= {"conditioning": "adaln-single", "text": "cross", "cross_norm": False, "pooled": False}
    backbone |= {"base_size": int(base)}
    ours = _renamed(backbone, tensors, PIXART_KEYS, said["in_channels"], said["caption_channels"])
    return Network(backbone=backbone, tensors=ours, channels=said["in_channels"], size=size,
                   context_dim=said["caption_channels"])  # fmt: skip


def write_pixart(network: Network) -> tuple[Settings, Tensors]:
    expect(network.backbone, PIXART_OURS, IN_DIFFUSERS)
    ours, said = network.backbone, _shared_written(network)
    if ours["mlp"] == "gelu":
        note(GELU)
    scale = network.size / ours["base_size"]
    said |= {"cross_attention_dim": ours["width"], "use_additional_conditions": False,
             "caption_channels": network.context_dim, "interpolation_scale": int(scale) if scale % 1 == 0 else scale}
    return said | PIXART_FIXED, _given(network, PIXART_KEYS)


def read_dit(about: Mapping[str, Any], tensors: Tensors) -> Network:
    said = settings(about, DIT, OLDER_FIXED | DIT_FIXED)
    backbone = _shared(said) | {"conditioning": "adaln-zero", "text": "none", "pooled": True}
    backbone |= {"pooled_projection": False, "base_size": said["sample_size"], "frequency_shift": 1.0}
    _drop_repeated(tensors, said["num_layers"])
    rows = tensors.pop(CLASSES, None)
    if rows is None:
        raise _missing(CLASSES)
    if len(rows) != said["num_embeds_ada_norm"] + 1:
        raise ValueError(f"{len(rows)} rows of classes, not {said['num_embeds_ada_norm']} and the null")
    width = backbone["width"]
    ours = _renamed(backbone, tensors, DIT_KEYS, said["in_channels"], width, width)
    return Network(backbone=backbone, tensors=ours, channels=said["in_channels"], size=said["sample_size"],
                   context_dim=0, pooled_dim=width, labels=torch.cat([rows[-1:], rows[:-1]]))  # fmt: skip


def _drop_repeated(tensors: Tensors, depth: int) -> None:
    """Leave of the embedders that each block has for itself the first. Raises UserError where they are not the same."""
    for key in [key for key in tensors if key.startswith(FIRST)]:
        for i in range(1, depth):
            own = f"transformer_blocks.{i}{key.removeprefix('transformer_blocks.0')}"
            if own not in tensors:
                raise _missing(own)
            if not torch.equal(tensors.pop(own), tensors[key]):
                said = f"{own} that is another than block 0's"
                raise foreign(said, "diffusers trained each block's own embedder; read are those that all blocks share")


def write_dit(network: Network) -> tuple[Settings, Tensors]:
    expect(network.backbone, DIT_OURS, IN_DIFFUSERS)
    ours, said = network.backbone, _shared_written(network)
    if network.labels is None or ours["base_size"] != network.size:
        reason = "a DiT without labels, or one drawn at another size than base_size"
        raise foreign(reason, "those whose text is label have", IN_DIFFUSERS)
    said |= {"num_embeds_ada_norm": len(network.labels) - 1}
    tensors = _given(network, DIT_KEYS) | {CLASSES: torch.cat([network.labels[1:], network.labels[:1]])}
    for key in [key for key in tensors if key.startswith(FIRST)]:
        for i in range(1, ours["depth"]):
            tensors[f"transformer_blocks.{i}{key.removeprefix('transformer_blocks.0')}"] = tensors[key].clone()
    return said | DIT_FIXED, tensors


def their_names(key: str, keys: tuple[tuple[str, str], ...]) -> list[str]:
    """What a tensor of ours is called in diffusers: one name, or those of the parts of a fused projection."""
    for pattern, replacement in keys:
        key = re.sub(pattern, replacement, key)
    fused = re.search(r"\.(qkv|kv)\.", key)
    return [key.replace(fused[0], f".to_{letter}.") for letter in fused[1]] if fused else [key]


def _renamed(backbone: Settings, tensors: Tensors, keys: tuple[tuple[str, str], ...], channels: int, context_dim: int,
             pooled_dim: int | None = None) -> Tensors:  # fmt: skip
    """diffusers' tensors by our names. Raises UserError naming what is missing or is left over."""
    with torch.device("meta"):
        config = DiT(**{key: value for key, value in backbone.items() if key != "kind"})
        own = config.build(channels=channels, context_dim=context_dim, pooled_dim=pooled_dim).state_dict()
    left = {key: value for key, value in tensors.items() if key not in NOT_READ}
    ours = {}
    for key, like in own.items():
        names = their_names(key, keys)
        if missing := [name for name in names if name not in left]:
            raise _missing(missing[0])
        found = torch.cat([left.pop(name) for name in names])
        ours[key] = found.flatten(1) if found.ndim == 4 and like.ndim == 2 else found
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise foreign(f"tensor {min(left)}{more}", "the weights are of another network than config.json describes")
    return ours


def _missing(name: str) -> UserError:
    return UserError(f"tensor {name} is missing", hint="is the file complete?", code=CHECKPOINT)


def _given(network: Network, keys: tuple[tuple[str, str], ...]) -> Tensors:
    """Our tensors by diffusers' names, fused ones apart, each in its own memory."""
    patch, theirs = network.backbone["patch"], dict[str, Tensor]()
    for key, value in network.tensors.items():
        value = value.view(len(value), -1, patch, patch) if key == "patch_embedding.weight" else value
        names = their_names(key, keys)
        theirs |= {name: part.clone() for name, part in zip(names, value.chunk(len(names)), strict=True)}
    return theirs
