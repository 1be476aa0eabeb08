"""A U-Net of ours with all that it draws with as one file, as Stable Diffusion 1 is published: LDM's names.

`model.diffusion_model.`, `first_stage_model.` and `cond_stage_model.transformer.` hold denoiser, autoencoder and CLIP.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder.kl import KL
from ldm.backbones import UNet
from ldm.schedules import DDPMScaledLinear
from ldm.text import HuggingFace
from ldm.text.huggingface import HuggingFaceTextEncoder
from training.exchange.autoencoder_layouts import fold
from training.exchange.autoencoders import ATTENTION, RENAMED
from training.exchange.export_limits import Facts, Obstacle, obstacles
from training.exchange.single_file_import import OUTSIDE, RESNET
from training.files import write_bytes
from training.messages import note
from training.models.assembly import HashedPipeline
from training.settings.decoding import DenoiserConfig
from training.tensors import save_tensors

FACTOR = 0.18215  # what programs multiply latents of Stable Diffusion 1 by, whatever a file says
# diffusers' names -> LDM's: of the parts of a residual block, and of what is outside the numbered blocks.
PARTS, ENDS = ({ours.removesuffix("."): ldm.removesuffix(".") for ldm, ours in names.items()}
               for names in (RESNET, OUTSIDE))  # fmt: skip
# Shapes that other programs know by their tensors: heads, channels a head, and the width of the text.
KNOWN = {"Stable Diffusion 1": (8, 0, 768, False), "Stable Diffusion 2": (8, 64, 1024, True)}


def reasons(config: DenoiserConfig, facts: Facts) -> list[Obstacle]:
    """Every reason why the file cannot hold a model, the pipeline's among them."""
    found = [*obstacles(config, facts), *_of_file(config, facts.clip), *_of_autoencoder(facts.model)]
    return list({reason.key: reason for reason in found}.values())


def _of_file(config: DenoiserConfig, clip: bool) -> Iterator[Obstacle]:
    """What its programs build, of LDM's settings, and no file can change."""
    backbone, schedule, text = config.backbone, config.schedule, config.text
    if backbone.kind != "unet":
        yield Obstacle("backbone.kind", backbone.kind, "it holds a U-Net", '"unet" can be written')
        return
    if backbone.learned_variance:
        yield Obstacle("backbone.learned_variance", True, "its programs know none", "false can be written")
    if backbone.groups != 32:
        yield Obstacle("backbone.groups", backbone.groups, "its programs have 32 groups", "32 can be written")
    if any(width % backbone.channels[0] for width in backbone.channels):
        why = "its programs multiply the first width"
        yield Obstacle("backbone.channels", backbone.channels, why, "whole multiples of the first can be written")
    if backbone.head_dim and not (backbone.head_dim == 64 and backbone.linear_projection):
        why = "its programs have as many heads everywhere or, with linear projections, 64 channels a head"
        yield Obstacle("backbone.head_dim", backbone.head_dim, why, "0 can be written, or 64 with linear_projection")
    if not clip and isinstance(text, HuggingFace):
        yield Obstacle("text.kind", text.kind, "its text encoder is CLIP's", "a CLIP text encoder can be written")
    if (length := getattr(text, "length", 77)) != 77:
        yield Obstacle("text.length", length, "its programs fill prompts up to 77 tokens", "77 can be written")
    if getattr(text, "mask_rule", 2) != 2:
        yield Obstacle("text.mask_rule", 1, "its programs tell CLIP of no padding", "2 can be written")
    if not isinstance(schedule, DDPMScaledLinear) or schedule.zero_terminal_snr or schedule.shift != 1:
        why = "its programs know the scaled-linear table alone, without shift or zero terminal SNR"
        yield Obstacle("schedule.kind", schedule.kind, why, '"ddpm-scaled-linear" can be written')
    elif config.prediction.kind not in ("eps", "v"):
        kinds = '"eps" and "v" can be written'
        yield Obstacle("prediction.kind", config.prediction.kind, "its programs know these two", kinds)


def _of_autoencoder(inner: Any) -> Iterator[Obstacle]:
    for key, value in {"groups": 32, "mid_attention": True}.items():
        if (ours := getattr(inner, key, value)) != value:
            yield Obstacle(f"model.{key} (autoencoder)", ours, "its programs build another", f"{value} can be written")


def write(path: Path, config: DenoiserConfig, inner: KL, pipeline: HashedPipeline) -> None:
    """The file, and beside it FILE.yaml, the settings that programs of Stable Diffusion read of a model."""
    backbone, text = pipeline.denoiser.backbone, pipeline.text
    assert isinstance(backbone, torch.nn.Module) and isinstance(text, HuggingFaceTextEncoder)
    tensors = {unet_name(key, config.backbone): value for key, value in backbone.state_dict().items()}
    images = {key: value.clone() for key, value in pipeline.autoencoder.state_dict().items()}
    shift, scale = images.pop("norm.shift").flatten(), images.pop("norm.scale").flatten()
    fold(images, shift, scale * FACTOR)  # so that what programs multiply by it are our latents
    tensors |= dict(vae_name(key, value, len(inner.channels)) for key, value in images.items())
    for key, value in text.model.state_dict().items():
        if key != "text_projection.weight":
            tensors[f"cond_stage_model.transformer.{key}"] = value
    save_tensors(path, tensors, {"format": "pt"})
    write_bytes(path.with_suffix(".yaml"), settings(config, inner, text.context_dim).encode())
    if shape := _known(config, text):
        note(f"the U-Net has the shape of {shape}, by which other programs know it")
    else:
        yaml = path.with_suffix(".yaml").name
        note(f"the U-Net has the shape of neither {' nor '.join(KNOWN)}: only programs that read {yaml} will know it")


def _known(config: DenoiserConfig, text: HuggingFaceTextEncoder) -> str:
    """Of which model a U-Net has the shape; empty where of none. `heads` counts where there is no `head_dim`."""
    own = config.backbone
    for name, (heads, dim, width, linear) in KNOWN.items():
        if (UNet(heads=own.heads if dim else heads, head_dim=dim, linear_projection=linear), width) == (
            dataclasses.replace(own, gradient_checkpointing=False),
            text.context_dim,
        ):
            return name
    return ""


def settings(config: DenoiserConfig, inner: KL, width: int) -> str:
    """FILE.yaml: LDM's config of the model, in the form of Stable Diffusion's v1-inference.yaml (JSON is YAML too)."""
    backbone, schedule = config.backbone, config.schedule
    assert isinstance(schedule, DDPMScaledLinear)
    height, levels = config.sample.size[0], len(inner.channels)
    heads = {"num_head_channels": backbone.head_dim} if backbone.head_dim else {"num_heads": backbone.heads}
    unet = {"image_size": height >> levels - 1, "in_channels": inner.latent_channels,
            "out_channels": inner.latent_channels, "model_channels": backbone.channels[0],
            "attention_resolutions": [2**level for level in backbone.attention], "num_res_blocks": backbone.blocks,
            "channel_mult": [channels // backbone.channels[0] for channels in backbone.channels], **heads,
            "use_spatial_transformer": True, "use_linear_in_transformer": backbone.linear_projection,
            "transformer_depth": backbone.depth, "context_dim": width, "use_checkpoint": False, "legacy": False,
            "use_scale_shift_norm": backbone.scale_shift}  # fmt: skip
    vae = {"double_z": True, "z_channels": inner.latent_channels, "resolution": height,
           "in_channels": inner.image_channels, "out_ch": inner.image_channels, "ch": inner.channels[0],
           "ch_mult": [channels / inner.channels[0] for channels in inner.channels], "num_res_blocks": inner.blocks,
           "attn_resolutions": [height // factor for factor in inner.attention_at], "dropout": 0.0}  # fmt: skip
    first = {"embed_dim": inner.latent_channels, "ddconfig": vae, "lossconfig": {"target": "torch.nn.Identity"}}
    params = {"linear_start": schedule.beta_min, "linear_end": schedule.beta_max, "timesteps": schedule.steps,
              "parameterization": config.prediction.kind, "scale_factor": FACTOR, "channels": inner.latent_channels,
              "image_size": height >> levels - 1, "first_stage_key": "jpg", "cond_stage_key": "txt",
              "conditioning_key": "crossattn", "cond_stage_trainable": False, "use_ema": False,
              "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
              "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": first},
              "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}}  # fmt: skip
    return json.dumps({"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}, indent=2)


def unet_name(key: str, backbone: Any) -> str:
    """LDM's name: the blocks of each half are counted from its beginning, resamplers too, and parts go by place."""
    part, _, rest = key.rpartition(".")
    if part in ENDS:
        return f"model.diffusion_model.{ENDS[part]}.{rest}"
    kinds = "resnets|attentions|downsamplers|upsamplers"
    found = re.fullmatch(rf"(down|mid|up)_blocks?\.(?:(\d+)\.)?({kinds})\.(\d+)\.(.*)", key)
    assert found, key
    half, level, kind, j, inner = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        name, _, end = inner.rpartition(".")
        inner = f"{PARTS[name]}.{end}"
    if half == "mid":
        return f"model.diffusion_model.middle_block.{2 * j if kind == 'resnets' else 1}.{inner}"
    stride, place = backbone.blocks + 1, int(kind == "attentions")
    if half == "down":  # behind conv_in
        j, inner = (backbone.blocks, inner.replace("conv.", "op.")) if kind == "downsamplers" else (j, inner)
        return f"model.diffusion_model.input_blocks.{1 + level * stride + j}.{place}.{inner}"
    if kind == "upsamplers":  # behind the last resnet of its level, and its attention
        j, place = backbone.blocks, 1 + (len(backbone.channels) - 1 - level in backbone.attention)
    return f"model.diffusion_model.output_blocks.{level * stride + j}.{place}.{inner}"


def vae_name(key: str, value: Tensor, levels: int) -> tuple[str, Tensor]:
    """LDM's name of an autoencoder's tensor, and its shape: attention is made of 1x1 convolutions there."""
    if part := re.match(r"(.*\.attentions\.\d+)\.(.+)\.(weight|bias)$", key):
        names = {ours: theirs for theirs, ours in reversed(ATTENTION.items())}
        key = f"{part[1]}.{names[part[2]]}.{part[3]}"
        value = value[:, :, None, None] if value.ndim == 2 else value
    key = re.sub(r"up_blocks\.(\d+)", lambda level: f"up_blocks.{levels - 1 - int(level[1])}", key)
    for theirs, ours in RENAMED:  # patterns with at most one number, the other way round
        pattern, plain = re.escape(ours).replace(r"\\1", r"(\d+)"), theirs.replace(r"(\d+)", r"\1")
        key = re.sub(rf"(?<=\.){pattern}", plain.replace(r"\.", "."), key)
    return f"first_stage_model.{key}", value
