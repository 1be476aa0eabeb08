"""Stable Diffusion's single files of the LDM program: U-Net, autoencoder and text encoder in one safetensors file.

The shape of the U-Net is read off its tensors; diffusers' names follow from the order of LDM's blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from training.errors import CHECKPOINT, UserError
from training.exchange import autoencoders
from training.exchange.denoiser_sources import Asked, Donor, no_autoencoder, read_class, read_folder, usual_process
from training.exchange.diffusers_weights import PART
from training.exchange.layout import Network, Settings, Tensors, foreign
from training.exchange.scheduler_import import Process, rule_of
from training.ledger import Ledger
from training.tensors import check_weights, load_tensors

UNET, TEXT, OPENCLIP = "model.diffusion_model.", "cond_stage_model.transformer.", "cond_stage_model.model."
OUTSIDE = {"time_embed.0.": "time_embedding.linear_1.", "time_embed.2.": "time_embedding.linear_2.",
           "label_emb.0.0.": "class_embedding.linear_1.", "label_emb.0.2.": "class_embedding.linear_2.",
           "out.0.": "conv_norm_out.", "out.2.": "conv_out.", "input_blocks.0.0.": "conv_in."}  # fmt: skip
RESNET = {"in_layers.0.": "norm1.", "in_layers.2.": "conv1.", "emb_layers.1.": "time_emb_proj.",
          "out_layers.0.": "norm2.", "out_layers.3.": "conv2.", "skip_connection.": "conv_shortcut."}  # fmt: skip
MIDDLE = {"0.": "resnets.0.", "1.": "attentions.0.", "2.": "resnets.1."}
CHANNELS_A_HEAD = 64  # of Stable Diffusion 2, whose projections are linear layers
HEADS = 8  # of Stable Diffusion 1
PASSED_OVER = ("model_ema.", "cond_stage_model.", "first_stage_model.", "alphas_cumprod", "betas", "log_", "sqrt_",
               "posterior_", "scale_factor", "logvar", "lvlb_", "model.diffusion_model.")  # fmt: skip
# OpenCLIP's names of a layer's parts -> those of transformers' CLIP.
LAYER = {"ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "attn.out_proj.": "self_attn.out_proj.",
         "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2."}  # fmt: skip
ENDS = {"token_embedding.weight": "embeddings.token_embedding.weight", "ln_final.": "final_layer_norm.",
        "positional_embedding": "embeddings.position_embedding.weight"}  # fmt: skip


def read_file(path: Path, asked: Asked, ledger: Ledger) -> Donor:
    """A single file, or, where it is one network of diffusers' (or a shard of it), the folder around it.

    Raises UserError for files without an LDM U-Net, for networks there is no counterpart of, and where no tokenizer is
    given, which such files never hold.
    """
    if PART.fullmatch(path.name):
        return read_folder(path.parent, asked, ledger)
    tensors = load_tensors(path)
    if f"{UNET}input_blocks.0.0.weight" not in tensors:
        if (path.parent / "config.json").is_file():
            return read_folder(path.parent, asked, ledger, path)
        hint = "expected tensors model.diffusion_model.*, or a config.json of diffusers beside it"
        raise UserError(f"{path} holds no denoiser of Stable Diffusion's", hint=hint, code=CHECKPOINT)
    if odd := sorted(key for key in tensors if not key.startswith(PASSED_OVER)):
        ledger.add("ignored", "tensors that are not known here", odd[0], count=len(odd))
    averaged = sum(key.startswith("model_ema.") for key in tensors)
    ledger.add("ignored", "tensors of an average that is stored besides", "model_ema", count=averaged)
    network = _network(path, tensors, asked, ledger)
    if not asked.text_encoder:
        reason = f"{path} holds no tokenizer (a single file never does)"
        hint = "name the text encoder that it was made with: --text-encoder NAME|DIR"
        raise UserError(reason, hint=hint, code=CHECKPOINT)
    own = _text_tensors(tensors)
    if not own:
        ledger.add("replaced", "the text encoder, which the file lacks", asked.text_encoder)
    if not asked.autoencoder and not any(key.startswith("first_stage_model.") for key in tensors):
        raise no_autoencoder(path)
    inner = asked.autoencoder or autoencoders.read_tensors(path, tensors)
    text = {"kind": "huggingface", "length": 77, "masked": False, "pooling": "auto" if network.pooled_dim else "none"}
    return Donor(network=network, process=_process(tensors, network, asked, ledger), autoencoder=inner, text=text,
                 encoder=asked.text_encoder, text_tensors=own or None)  # fmt: skip


def _network(path: Path, file_tensors: Mapping[str, Tensor], asked: Asked, ledger: Ledger) -> Network:
    ldm = {key.removeprefix(UNET): value for key, value in file_tensors.items() if key.startswith(UNET)}
    try:
        places = _places(ldm)
        about = _settings(ldm, places, asked, ledger)
    except (LookupError, ValueError, RuntimeError) as failure:
        reason = f"{path}: not a whole U-Net of LDM's ({type(failure).__name__}: {failure})"
        raise UserError(reason, hint="is the file complete?", code=CHECKPOINT) from None
    except UserError as problem:
        raise UserError(f"{path}: {problem.what}", hint=problem.hint, code=problem.code) from None
    tensors = {_renamed(key, places): value.float() for key, value in ldm.items()}
    return read_class("UNet2DConditionModel", about, tensors, path)


def _places(ldm: Mapping[str, Tensor]) -> dict[str, str]:
    """Where diffusers keeps what LDM's numbered blocks hold: `input_blocks.4.1.` -> `down_blocks.1.attentions.0.`"""
    places, level, j = dict[str, str](), 0, 0
    for n in range(1, _count(ldm, "input_blocks")):
        if f"input_blocks.{n}.0.op.weight" in ldm:
            places[f"input_blocks.{n}.0.op."] = f"down_blocks.{level}.downsamplers.0.conv."
            level, j = level + 1, 0
        else:
            places[f"input_blocks.{n}.0."] = f"down_blocks.{level}.resnets.{j}."
            places[f"input_blocks.{n}.1."] = f"down_blocks.{level}.attentions.{j}."
            j += 1
    for n in range(_count(ldm, "output_blocks")):
        up, j = divmod(n, _count(ldm, "output_blocks") // (level + 1))
        sampler = next((i for i in (1, 2) if f"output_blocks.{n}.{i}.conv.weight" in ldm), 3)
        places[f"output_blocks.{n}.0."] = f"up_blocks.{up}.resnets.{j}."
        places[f"output_blocks.{n}.{sampler}."] = f"up_blocks.{up}.upsamplers.0."
        if sampler != 1:
            places[f"output_blocks.{n}.1."] = f"up_blocks.{up}.attentions.{j}."
    return places | {f"middle_block.{old}": f"mid_block.{new}" for old, new in MIDDLE.items()} | OUTSIDE


def _count(ldm: Mapping[str, Tensor], blocks: str) -> int:
    return 1 + max(int(key.split(".")[1]) for key in ldm if key.startswith(f"{blocks}."))


def _renamed(key: str, places: Mapping[str, str]) -> str:
    """LDM's key as diffusers names it; one that it has no place for stays, to be named as left over."""
    old = next((old for old in sorted(places, key=len, reverse=True) if key.startswith(old)), None)
    if old is None:
        return key
    new, rest = places[old], key.removeprefix(old)
    if ".resnets." in new:
        part = next((part for part in RESNET if rest.startswith(part)), "")
        rest = RESNET.get(part, "") + rest.removeprefix(part)
    return new + rest


def _settings(ldm: Mapping[str, Tensor], places: Mapping[str, str], asked: Asked, ledger: Ledger) -> Settings:
    """What diffusers' config.json would say. Raises UserError for networks of other programs by name."""
    if "label_emb.0.0.weight" in ldm:
        said = "label_emb (size and pooled text told to the network, as in Stable Diffusion XL)"
        raise foreign(said, "Stable Diffusion 1 and 2 are read")
    named = {new: old for old, new in places.items()}
    levels = 1 + max(int(new.split(".")[1]) for new in named if new.startswith("down_blocks."))
    first = [named[f"down_blocks.{i}.resnets.0."] for i in range(levels)]
    widths = [len(ldm[f"{old}in_layers.2.weight"]) for old in first]
    blocks = sum(new.startswith("down_blocks.0.resnets.") for new in named)
    text = [named[f"down_blocks.{i}.attentions.0."] for i in range(levels)]
    if any(key.endswith(".1.qkv.weight") for key in ldm):
        raise foreign("a U-Net without text", "Stable Diffusion 1 and 2 are read")
    attention = [f"{old}proj_in.weight" in ldm for old in text]
    middle = "middle_block.1."
    depths = [_depth(ldm, old) for old, there in zip(text, attention, strict=True) if there] + [_depth(ldm, middle)]
    scaled = len(ldm[f"{first[0]}emb_layers.1.weight"]) == 2 * widths[0]
    linear = ldm[f"{middle}proj_in.weight"].ndim == 2
    return {
        "in_channels": ldm["input_blocks.0.0.weight"].shape[1], "out_channels": len(ldm["out.2.weight"]),
        "block_out_channels": widths, "layers_per_block": blocks, "use_linear_projection": linear,
        "down_block_types": ["CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attention)],
        "cross_attention_dim": ldm[f"{middle}transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "transformer_layers_per_block": _same(depths), "attention_head_dim": _heads(widths, linear, asked, ledger),
        "resnet_time_scale_shift": "scale_shift" if scaled else "default", "sample_size": 96 if linear else 64,
    }  # fmt: skip


def _depth(ldm: Mapping[str, Tensor], old: str) -> int:
    return sum(re.fullmatch(rf"{re.escape(old)}transformer_blocks\.\d+\.norm1\.weight", key) is not None for key in ldm)


def _same(depths: list[int]) -> int:
    if len({*depths}) > 1:
        raise foreign(f"transformer depths {depths}", "one for all levels is read, as in Stable Diffusion 1 and 2")
    return depths[0]


def _heads(widths: list[int], linear: bool, asked: Asked, ledger: Ledger) -> Any:
    """Heads, one number or one a level; shapes do not tell them."""
    if asked.heads:
        return asked.heads
    if linear and all(width % CHANNELS_A_HEAD == 0 for width in widths):
        ledger.add("guessed", "64 channels an attention head, as in Stable Diffusion 2", "--heads N says it")
        return [width // CHANNELS_A_HEAD for width in widths]
    ledger.add("guessed", f"{HEADS} attention heads, as in Stable Diffusion 1", "--heads N says it")
    return HEADS


def _process(tensors: Mapping[str, Tensor], network: Network, asked: Asked, ledger: Ledger) -> Process:
    """On the file's own table where it stores one, else on the usual one. Raises UserError for one by no known rule."""
    own = None if asked.prediction == "velocity" else tensors.get("alphas_cumprod")
    rule = None if own is None else rule_of(own.double())
    if own is not None and rule is None:
        raise foreign("the table alphas_cumprod of the file", "tables linear in beta or in its root are read")
    return usual_process(network, asked.prediction, ledger, rule)


def _text_tensors(tensors: Mapping[str, Tensor]) -> Tensors:
    """The file's CLIP by the names of transformers' model, without their prefix; empty where it holds none. Of Stable
    Diffusion 2's OpenCLIP without the last layer, which it does not read."""
    clip = {key.removeprefix(TEXT).removeprefix("text_model."): value for key, value in tensors.items()
            if key.startswith(TEXT) and not key.endswith("position_ids")}  # fmt: skip
    if clip:
        return clip
    result: Tensors = {}
    for key, value in tensors.items():
        if key.startswith(OPENCLIP):
            result |= _of_openclip(key.removeprefix(OPENCLIP), value)
    last = f"encoder.layers.{max((int(key.split('.')[2]) for key in result if '.layers.' in key), default=0)}."
    return {key: value for key, value in result.items() if not key.startswith(last)}


def _of_openclip(key: str, value: Tensor) -> Tensors:
    """OpenCLIP's tensor under CLIP's names: q, k and v apart, the projection of the pooled text left out."""
    if part := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key):
        names = [f"encoder.layers.{part[1]}.self_attn.{letter}_proj.{part[2]}" for letter in "qkv"]
        return dict(zip(names, value.chunk(3), strict=True))
    if part := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?\.)(weight|bias)", key):
        return {f"encoder.layers.{part[1]}.{LAYER.get(part[2], part[2])}{part[3]}": value}
    for old, new in ENDS.items():
        if key.startswith(old):
            return {new + key.removeprefix(old): value}
    return {}


def fill_text(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Give the text encoder of `source` the weights of a single file. Raises UserError where they are of another."""
    own = model.state_dict()
    inner = {key.removeprefix("text_model."): key for key in own if "text_projection" not in key}
    odd = sorted(inner.keys() ^ tensors.keys())
    odd += [key for key in sorted(inner.keys() & tensors.keys()) if own[inner[key]].shape != tensors[key].shape]
    if odd:
        reason = f"the text encoder in the file is not of the shape of {source} (tensor {odd[0]})"
        raise UserError(reason, hint="give the one it was made with: --text-encoder NAME|DIR", code=CHECKPOINT)
    check_weights(tensors, {key: own[inner[key]] for key in tensors}, "the text encoder in the file")
    model.load_state_dict(own | {inner[key]: value for key, value in tensors.items()})
