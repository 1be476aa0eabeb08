"""Autoencoders of other programs: diffusers' folders and LDM's single files, read; diffusers' folders, written.

Our keys are those of diffusers' classes, plus `norm`, the latent normaliser. Only safetensors is
read. diffusers itself is not needed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training import config as configs
from training.errors import CHECKPOINT, UserError
from training.files import load_tensors, read_json, save_tensors, write_json
from training.runs import export, fill, find, load_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# What LDM calls what diffusers calls otherwise, in both halves.
RENAMED = (
    (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."),
    (r"mid\.attn_1\.", "mid_block.attentions.0."),
    (r"down\.(\d+)\.block\.", r"down_blocks.\1.resnets."),
    (r"down\.(\d+)\.attn\.", r"down_blocks.\1.attentions."),
    (r"down\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"up\.(\d+)\.block\.", r"up_blocks.\1.resnets."),
    (r"up\.(\d+)\.attn\.", r"up_blocks.\1.attentions."),
    (r"up\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."),
    (r"norm_out\.", "conv_norm_out."),
    (r"nin_shortcut\.", "conv_shortcut."),
)
# Names of attention's layers in LDM, and in diffusers' files of before 2023.
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "norm": "group_norm", "proj_out": "to_out.0",
             "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # fmt: skip


class Imported(NamedTuple):
    """`[model]` of a config, and the tensors that fit it."""

    model: dict[str, Any]
    tensors: dict[str, Tensor]


def import_autoencoder(source: str, output: Path) -> str:
    """Read `source` (a diffusers folder or its parent pipeline's, a repository's name, or an LDM safetensors file) and
    write it as a model folder, which every later step takes for a run. Returns its content hash.

    Raises UserError for pickles, for classes there is no counterpart of, and for weights of another shape.
    """
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise UserError(f"{output} already exists", hint="choose another --output", code=CHECKPOINT)
    path = Path(source) if Path(source).exists() else _download(source)
    found = read_file(path) if path.is_file() else read_folder(path)
    config = configs.decode("autoencoder", {"model": found.model})
    assert isinstance(config, configs.AutoencoderConfig)
    model = config.model.build()
    fill(model, found.tensors, path)
    card = f"# Autoencoder ({found.model['kind']})\n\nTaken from another program's checkpoint; not trained here.\n"
    return export(output, configs.to_values(config), model.state_dict(), card)


def _download(name: str) -> Path:
    """A repository of the Hugging Face hub: its JSON and safetensors."""
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"{name}: no such file or folder", hint="give a folder, a .safetensors file or ORG/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as failure:  # offline, missing, gated: the hub has a class of its own for each
        raise UserError(
            f"{name} could not be had from the Hugging Face hub ({type(failure).__name__})",
            hint=f"download its {WEIGHTS} and config.json elsewhere, and give their folder",
            code=CHECKPOINT,
        ) from None


def read_folder(folder: Path) -> Imported:
    """A folder as diffusers' `save_pretrained` writes it, or a pipeline's, whose vae/ or vqvae/ is taken."""
    home = next((f for f in (folder, folder / "vae", folder / "vqvae") if (f / "config.json").is_file()), None)
    if home is None:
        raise UserError(f"{folder}: no config.json in it", hint="give a folder that diffusers wrote", code=CHECKPOINT)
    about = read_json(home / "config.json")
    if not (home / WEIGHTS).is_file():
        pickled = next((p.name for p in sorted(home.iterdir()) if p.suffix in PICKLES), None)
        said = f"{home} holds {pickled}, a pickle, which is not read" if pickled else f"{home} holds no {WEIGHTS}"
        raise UserError(said, hint="save it with safe_serialization=True", code=CHECKPOINT)
    read = READERS.get(about.get("_class_name", ""))
    if read is None:
        said = f"{home}: a {about.get('_class_name')} has no counterpart here"
        raise UserError(said, hint=f"{', '.join(READERS)} are read", code=CHECKPOINT)
    return read(about, modernised(load_tensors(home / WEIGHTS)))


def _shape(about: Mapping[str, Any]) -> dict[str, Any]:
    """What both classes say alike. Raises UserError for blocks that only other programs have."""
    blocks = [*about["down_block_types"], *about["up_block_types"]]
    levels = range(len(about["block_out_channels"]))
    plain = {"DownEncoderBlock2D", "UpDecoderBlock2D", "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"}
    if odd := set(blocks) - plain:
        hint = f"known: {', '.join(sorted(plain))}"
        raise UserError(f"{odd.pop()} has no counterpart here", hint=hint, code=CHECKPOINT)
    return {
        "channels": about["block_out_channels"],
        "blocks": about.get("layers_per_block", 1),
        "image_channels": about.get("in_channels", 3),
        "groups": about.get("norm_num_groups", 32),
        "mid_attention": about.get("mid_block_add_attention", True),
        "attention_at": [2**i for i in levels if about["down_block_types"][i].startswith("Attn")],
    }


def _kl(about: Mapping[str, Any], tensors: dict[str, Tensor]) -> Imported:
    width = about.get("latent_channels", 4)
    for name, size in (("quant_conv", 2 * width), ("post_quant_conv", width)):
        if f"{name}.weight" not in tensors:  # Stable Diffusion 3 and later leave them out: the identity
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.eye(size)[:, :, None, None], torch.zeros(size)
    mean, std = (about.get(key) for key in ("latents_mean", "latents_std"))
    shift = torch.tensor(mean if mean else [about.get("shift_factor") or 0.0] * width)
    scale = torch.tensor(std if std else [1 / about.get("scaling_factor", 0.18215)] * width)
    norm = {"norm.shift": shift.view(1, width, 1, 1), "norm.scale": scale.view(1, width, 1, 1)}
    return Imported({"kind": "kl", **_shape(about), "latent_channels": width}, tensors | norm)


def _vq(about: Mapping[str, Any], tensors: dict[str, Tensor]) -> Imported:
    codes = tensors["quantize.embedding.weight"]
    norm = _scaled(1, about.get("scaling_factor", 0.18215))
    model = {"kind": "vq", **_shape(about), "encoder_channels": about.get("latent_channels", 3)}
    return Imported(model | {"codes": len(codes), "latent_channels": codes.shape[1]}, tensors | norm)


def _tiny(about: Mapping[str, Any], tensors: dict[str, Tensor]) -> Imported:
    widths = {*about["encoder_block_out_channels"], *about["decoder_block_out_channels"]}
    _expect(about, {"act_fn": "relu", "upsampling_scaling_factor": 2, "latent_magnitude": 3, "latent_shift": 0.5})
    if len(widths) > 1:
        raise UserError(f"levels of different width ({sorted(widths)}) have no counterpart here", code=CHECKPOINT)
    model = {"kind": "tiny", "width": widths.pop(), "latent_channels": about["latent_channels"],
             "image_channels": about["in_channels"], "encoder_blocks": about["num_encoder_blocks"],
             "decoder_blocks": about["num_decoder_blocks"]}  # fmt: skip
    return Imported(model, tensors | _scaled(about["latent_channels"], about.get("scaling_factor", 1.0)))


def _dc(about: Mapping[str, Any], tensors: dict[str, Tensor]) -> Imported:
    twice = {"encoder_block_types": "decoder_block_types", "encoder_qkv_multiscales": "decoder_qkv_multiscales",
             "encoder_block_out_channels": "decoder_block_out_channels"}  # fmt: skip
    _expect(about, {ours: about[key] for key, ours in twice.items()})
    _expect(about, {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "upsample_block_type": "pixel_shuffle",
                    "downsample_block_type": "pixel_unshuffle"})  # fmt: skip
    types = about["encoder_block_types"]
    types = [types] * len(about["encoder_block_out_channels"]) if isinstance(types, str) else types
    model = {"kind": "dc", "channels": about["encoder_block_out_channels"], "image_channels": about["in_channels"],
             "encoder_blocks": about["encoder_layers_per_block"], "decoder_blocks": about["decoder_layers_per_block"],
             "latent_channels": about["latent_channels"],
             "attention_at": [2**i for i, kind in enumerate(types) if kind == "EfficientViTBlock"]}  # fmt: skip
    return Imported(model, tensors | _scaled(about["latent_channels"], about.get("scaling_factor", 1.0)))


def _expect(about: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError at the first setting that is there and is another one: it would be another network."""
    for key, value in wanted.items():
        if about.get(key, value) != value:
            said = f"{key} = {about[key]!r} has no counterpart here"
            raise UserError(said, hint=f"only {value!r} is read", code=CHECKPOINT)


def _scaled(channels: int, factor: float) -> dict[str, Tensor]:
    """The normaliser of latents that are z times one number."""
    scale = torch.full((1, channels, 1, 1), 1 / factor)
    return {"norm.shift": torch.zeros_like(scale), "norm.scale": scale}


READERS = {"AutoencoderKL": _kl, "VQModel": _vq, "AutoencoderTiny": _tiny, "AutoencoderDC": _dc}


def read_file(path: Path) -> Imported:
    """An LDM or Stable Diffusion safetensors file; its shape is read off the tensors (32 groups, as all of them have).

    Its normaliser is the file's `scale_factor` where there is one, else Stable Diffusion's 0.18215.
    """
    whole = load_tensors(path)
    prefix = "first_stage_model." if any(key.startswith("first_stage_model.") for key in whole) else ""
    ldm = {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}
    if "encoder.conv_in.weight" not in ldm:
        hint = "expected tensors first_stage_model.encoder.* or encoder.*"
        raise UserError(f"{path} holds no autoencoder of LDM's", hint=hint, code=CHECKPOINT)
    levels = 1 + max(int(key.split(".")[2]) for key in ldm if re.match(r"encoder\.down\.\d+\.", key))
    blocks = 1 + max(int(key.split(".")[4]) for key in ldm if re.match(r"encoder\.down\.0\.block\.\d+\.", key))
    attention = [f"encoder.down.{i}.attn.0.q.weight" in ldm for i in range(levels)]
    about = {
        "block_out_channels": [len(ldm[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)],
        "down_block_types": ["AttnDownEncoderBlock2D" if there else "DownEncoderBlock2D" for there in attention],
        "up_block_types": [],
        "layers_per_block": blocks,
        "in_channels": ldm["encoder.conv_in.weight"].shape[1],
        "latent_channels": ldm["decoder.conv_in.weight"].shape[1],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in ldm,
        "scaling_factor": float(whole.get("scale_factor", torch.tensor(0.18215))),
    }
    keep = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
    tensors = modernised({_renamed(key, levels): value for key, value in ldm.items() if key.startswith(keep)})
    return (_vq if "quantize.embedding.weight" in tensors else _kl)(about, tensors)


def _renamed(key: str, levels: int) -> str:
    """LDM's key as diffusers names it. LDM counts the decoder's levels from the picture, diffusers from the latents."""
    for old, new in RENAMED:
        key = re.sub(rf"(?<=\.){old}", new, key)
    return re.sub(r"up_blocks\.(\d+)", lambda level: f"up_blocks.{levels - 1 - int(level[1])}", key)


def modernised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention's layers by their present names, 1x1 convolutions among them as the matrices they are; float32."""
    found = {}
    for key, value in tensors.items():
        if part := re.match(r"(.*\.attentions\.\d+)\.(\w+)\.(weight|bias)$", key):
            key = f"{part[1]}.{ATTENTION.get(part[2], part[2])}.{part[3]}"
            value = value.flatten(1) if value.ndim == 4 else value
        elif re.search(r"\.attentions\.\d+\.", key) and value.ndim == 4:
            value = value.flatten(1)
        found[key] = value.float()
    return found


def export_autoencoder(path: str, output: Path) -> None:
    """Write a run's autoencoder as diffusers does. Raises UserError for kinds diffusers has no class for.

    A KL model's normaliser is folded into its 1x1 convolutions, mean' = (mean - shift) / scale, since pipelines know
    one number only; a VQ model's scale becomes `scaling_factor`, as its codes cannot be moved.
    """
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise UserError(f"{output} already exists", hint="choose another --output", code=CHECKPOINT)
    home, _ = find(path, "autoencoder")
    model = read_json(home / "config.json")["model"]
    tensors = {key: value.clone() for key, value in load_autoencoder(path).state_dict().items()}
    shift, scale = tensors.pop("norm.shift"), tensors.pop("norm.scale")
    if model["kind"] == "kl":
        fold(tensors, shift.flatten(), scale.flatten())
        own = {"_class_name": "AutoencoderKL", "latent_channels": model["latent_channels"], "scaling_factor": 1.0,
               "force_upcast": False, "use_quant_conv": True, "use_post_quant_conv": True}  # fmt: skip
    elif model["kind"] == "vq" and not model["normalize"]:
        own = {"_class_name": "VQModel", "latent_channels": model["encoder_channels"], "norm_type": "group",
               "num_vq_embeddings": model["codes"], "vq_embed_dim": model["latent_channels"],
               "scaling_factor": 1 / scale.item()}  # fmt: skip
        tensors = {key: x for key, x in tensors.items() if not key.startswith("quantize.") or "embedding" in key}
        if shift.item():
            said = f"latents here are (z - {shift.item():.6g}) * scaling_factor; VQModel has no shift"
            print(f"note: {said}", file=sys.stderr)
    else:
        said = f"diffusers has no class for a {model['kind']} autoencoder like this"
        raise UserError(said, hint="kl is written, and vq with normalize = false", code=CHECKPOINT)
    output.mkdir(parents=True, exist_ok=True)
    save_tensors(output / WEIGHTS, tensors, {"format": "pt"})
    write_json(output / "config.json", _about(model) | own)


def _about(model: Mapping[str, Any]) -> dict[str, Any]:
    """What both of diffusers' classes say of the network."""
    levels = [2**i in model["attention_at"] for i in range(len(model["channels"]))]
    return {
        "_diffusers_version": "0.35.0",
        "act_fn": "silu",
        "block_out_channels": model["channels"],
        "down_block_types": ["AttnDownEncoderBlock2D" if there else "DownEncoderBlock2D" for there in levels],
        "up_block_types": ["AttnUpDecoderBlock2D" if there else "UpDecoderBlock2D" for there in reversed(levels)],
        "in_channels": model["image_channels"],
        "out_channels": model["image_channels"],
        "layers_per_block": model["blocks"],
        "norm_num_groups": model["groups"],
        "mid_block_add_attention": model["mid_attention"],
    }


def fold(tensors: dict[str, Tensor], shift: Tensor, scale: Tensor) -> None:
    """Put z' = (z - shift) / scale into the convolutions around z, (C,) each: what they give and take is z'."""
    width = len(scale)
    weight, bias = tensors["quant_conv.weight"], tensors["quant_conv.bias"]
    weight[:width] /= scale[:, None, None, None]
    bias[:width] = (bias[:width] - shift) / scale
    bias[width:] -= 2 * scale.log()
    weight, bias = tensors["post_quant_conv.weight"], tensors["post_quant_conv.bias"]
    bias += weight[:, :, 0, 0] @ shift
    weight *= scale[None, :, None, None]
