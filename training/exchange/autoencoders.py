"""Autoencoders of other programs: diffusers' folders and LDM's single files, read.

Our keys are those of diffusers' classes, plus `norm`, the latent normaliser. Only safetensors is read. diffusers itself
is not needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoencoder.base import Autoencoder
from training.data.images import Images
from training.errors import CHECKPOINT, DATA, UserError, as_user_error
from training.exchange.autoencoder_layouts import LAYOUTS
from training.exchange.diffusers_weights import NAME, PART, WEIGHTS, folder_weights
from training.guarding import read_record
from training.messages import note, tell
from training.models.autoencoders import autoencoder_hashes
from training.models.folders import export, fill
from training.models.latent_scale import fit_norm
from training.models.pretrained import tell_download
from training.settings import decoding
from training.shards.reading import ShardSet
from training.tensors import load_tensors

HOMES = ("", "vae", "vqvae")  # where the autoencoder lies in a folder or a pipeline's
VERSION = "0.35.0"  # of diffusers', whose config.json is written
MEASURED = 1000  # pictures that the scale of latents is measured on, where it is asked for
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
    """`[model]` of a config and the tensors that fit it; `assumed`: the scaling_factor where the source has none."""

    model: dict[str, Any]
    tensors: dict[str, Tensor]
    assumed: float | None = None


def import_autoencoder(source: str, output: Path, data: str = "", scale_factor: float | None = None) -> str:
    """Read `source` (a diffusers folder or its parent pipeline's, a repository's name, or an LDM safetensors file) and
    write it as a model folder, which every later step takes for a run. Returns its content hash.

    The latents' scale is the source's own, or measured on the packed pictures `data`, or z * scale_factor. Raises
    UserError for pickles, for classes there is no counterpart of, and for weights of another shape.
    """
    check_unused(output)
    if scale_factor is not None and not 0 < scale_factor < math.inf:
        raise UserError(f"--scale-factor: must be above 0 (got {scale_factor:g})")
    if data and scale_factor:
        raise UserError("--data measures what --scale-factor states", hint="give one of them")
    path = Path(source) if Path(source).exists() else _download(source)
    donor = read_file(path) if path.is_file() else read_folder(path)
    config, model = built(donor, path)
    if data:
        _measure(model, data)
    elif scale_factor:
        norm = model.norm
        norm.set_(torch.zeros_like(norm.shift), torch.full_like(norm.scale, 1 / scale_factor))
    else:
        with as_user_error("measure it with --data DIR, or give --scale-factor X", CHECKPOINT):
            model.norm.set_(model.norm.shift.clone(), model.norm.scale.clone())
    if donor.assumed and not data and not scale_factor:
        text = f"{source} does not state the scale of its latents; scaling_factor {donor.assumed:g} is assumed"
        note(f"{text} (--data DIR measures it on packed pictures, --scale-factor X states it)")
    return _store(output, config, model)


def keep_autoencoder(donor: Imported, source: Path, output: Path) -> Autoencoder:
    """Write an autoencoder as a model folder, its latents as its source has them; returns it."""
    config, model = built(donor, source)
    hint = "import it alone, convert_autoencoder import with --scale-factor X, and give that run: --autoencoder RUN"
    with as_user_error(hint, CHECKPOINT):
        model.norm.set_(model.norm.shift.clone(), model.norm.scale.clone())
    if donor.assumed:
        note(f"{source} does not state the scale of its latents; scaling_factor {donor.assumed:g} is assumed")
    _store(output, config, model)
    return model.requires_grad_(False)


def built(donor: Imported, path: Path) -> tuple[decoding.AutoencoderConfig, Autoencoder]:
    """The config and the model of what was read."""
    config = decoding.decode("autoencoder", {"model": donor.model})
    assert isinstance(config, decoding.AutoencoderConfig)
    model: Autoencoder = config.model.build().eval()
    fill(model, donor.tensors, path)
    return config, model


def _store(output: Path, config: decoding.AutoencoderConfig, model: Autoencoder) -> str:
    origin = "Taken from another program's checkpoint; not trained here."
    about = {"origin": origin, "hashes": autoencoder_hashes(model)}
    return export(output, decoding.to_values(config), model.state_dict(), about)


def check_unused(output: Path) -> None:
    """Raises UserError where something is at `output`."""
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise UserError(f"{output} already exists", hint="choose another --output", code=CHECKPOINT)


def _measure(model: Autoencoder, data: str) -> None:
    """Set the normaliser from pictures, as stage one does in the end."""
    images = Images(ShardSet(data))
    tell(f"measuring the scale of latents on {min(len(images), MEASURED):,} pictures")
    with as_user_error("measure with pictures like those that it was trained on", DATA):
        fit_norm(model, images, MEASURED, 8)


def _download(name: str) -> Path:
    """A repository of the Hugging Face hub: its autoencoder, and nothing else of a pipeline."""
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"{name}: no such file or folder", hint="give a folder, a .safetensors file or ORG/NAME")
    from huggingface_hub import snapshot_download

    tell_download("autoencoder", name)
    try:
        wanted = [str(Path(home, file)) for home in HOMES for file in ("config.json", f"{NAME}*.safetensors*")]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as failure:  # offline, missing, gated: the hub has a class of its own for each
        raise UserError(
            f"{name} could not be downloaded from the Hugging Face hub ({type(failure).__name__})",
            hint=f"download its {WEIGHTS} and config.json elsewhere, and give their folder",
            code=CHECKPOINT,
        ) from None


def read_folder(folder: Path) -> Imported:
    """A folder as diffusers' `save_pretrained` writes it, or a pipeline's, whose vae/ or vqvae/ is taken."""
    home = next((folder / name for name in HOMES if (folder / name / "config.json").is_file()), None)
    if home is None:
        raise UserError(f"{folder}: no config.json in it", hint="give a folder that diffusers wrote", code=CHECKPOINT)
    return _of_class(home / "config.json", folder_weights(home), home)


def _of_class(config: Path, tensors: Mapping[str, Tensor], source: Path) -> Imported:
    """The class that a config.json of diffusers' names."""
    about = read_record(config, {})
    name = about.get("_class_name")
    if not isinstance(name, str) or name not in LAYOUTS:
        said = f"a {name:.80} has" if isinstance(name, str) else "what its config.json describes has"
        hint = f"{', '.join(LAYOUTS)} are read"
        raise UserError(f"{source}: {said} no counterpart here", hint=hint, code=CHECKPOINT)
    return _read(name, about, modernise(tensors), source)


def _read(name: str, about: Mapping[str, Any], tensors: dict[str, Tensor], source: Path) -> Imported:
    """A class of diffusers' by its name. Raises UserError for settings that it never writes."""
    _, usual, reader, _ = LAYOUTS[name]
    settings = {key: value for key, value in about.items() if value is not None}
    try:
        model, tensors = reader({"scaling_factor": usual} | settings, tensors)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as failure:
        reason = f"{source}: not the settings of {name} ({type(failure).__name__}: {failure})"
        hint = "check that config.json is complete and belongs to these weights"
        raise UserError(reason, hint=hint, code=CHECKPOINT) from None
    return Imported(model, tensors, None if "scaling_factor" in settings else usual)


def read_file(path: Path) -> Imported:
    """An LDM or Stable Diffusion safetensors file; its shape is read off the tensors (32 groups, as all of them have).

    One with diffusers' names is taken with the config.json beside it; a shard or its index as the folder they are in.
    Its scaling_factor is the file's `scale_factor` where there is one, else Stable Diffusion's, as `assumed` says.
    """
    if PART.fullmatch(path.name):
        return read_folder(path.parent)
    return read_tensors(path, load_tensors(path))


def read_tensors(path: Path, file_tensors: Mapping[str, Tensor]) -> Imported:
    """The autoencoder among the tensors of the file at `path`."""
    prefix = "first_stage_model." if any(key.startswith("first_stage_model.") for key in file_tensors) else ""
    ldm = {key.removeprefix(prefix): value for key, value in file_tensors.items() if key.startswith(prefix)}
    if not any(re.match(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", key) for key in ldm):
        return _beside_config(path, file_tensors)
    return _of_ldm(path, file_tensors, ldm)


def _beside_config(path: Path, tensors: Mapping[str, Tensor]) -> Imported:
    """A bare file that is not LDM's: its names are diffusers', whose settings are in config.json alone."""
    if (config := path.parent / "config.json").is_file():
        return _of_class(config, tensors, path)
    if any(key.startswith(("encoder.down_blocks.", "encoder.layers.", "encoder.project_out.")) for key in tensors):
        reason = f"{path} has the tensors of a diffusers autoencoder, but no config.json beside it states its settings"
        raise UserError(reason, hint="download the config.json of the same repository next to it", code=CHECKPOINT)
    hint = "expected tensors first_stage_model.encoder.* or encoder.*, or a config.json of diffusers beside it"
    raise UserError(f"{path} holds no autoencoder of LDM's", hint=hint, code=CHECKPOINT)


def _of_ldm(path: Path, file_tensors: Mapping[str, Tensor], ldm: Mapping[str, Tensor]) -> Imported:
    """The settings of an LDM file by its shapes. Raises UserError where some are missing."""
    try:
        levels, about = _ldm_settings(file_tensors, ldm)
    except (LookupError, ValueError, RuntimeError) as failure:
        reason = f"{path}: not a whole autoencoder of LDM's ({type(failure).__name__}: {failure})"
        raise UserError(reason, hint="is the file complete?", code=CHECKPOINT) from None
    keep = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
    tensors = modernise({_renamed(key, levels): value for key, value in ldm.items() if key.startswith(keep)})
    return _read("VQModel" if "quantize.embedding.weight" in tensors else "AutoencoderKL", about, tensors, path)


def _ldm_settings(file_tensors: Mapping[str, Tensor], ldm: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]]:
    """The number of levels, and what diffusers' config.json would say."""
    levels = 1 + max(int(key.split(".")[2]) for key in ldm if re.match(r"encoder\.down\.\d+\.", key))
    blocks = 1 + max(int(key.split(".")[4]) for key in ldm if re.match(r"encoder\.down\.0\.block\.\d+\.", key))
    attention = [f"encoder.down.{i}.attn.0.q.weight" in ldm for i in range(levels)]
    return levels, {
        "block_out_channels": [len(ldm[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)],
        "down_block_types": ["AttnDownEncoderBlock2D" if there else "DownEncoderBlock2D" for there in attention],
        "up_block_types": [],
        "layers_per_block": blocks,
        "in_channels": ldm["encoder.conv_in.weight"].shape[1],
        "latent_channels": ldm["decoder.conv_in.weight"].shape[1],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in ldm,
        "scaling_factor": float(file_tensors["scale_factor"]) if "scale_factor" in file_tensors else None,
    }


def _renamed(key: str, levels: int) -> str:
    """LDM's key as diffusers names it. LDM counts the decoder's levels from the picture, diffusers from the latents."""
    for old, new in RENAMED:
        key = re.sub(rf"(?<=\.){old}", new, key)
    return re.sub(r"up_blocks\.(\d+)", lambda level: f"up_blocks.{levels - 1 - int(level[1])}", key)


def modernise(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention's layers by their present names, 1x1 convolutions among them as the matrices they are; float32."""
    result = {}
    for key, value in tensors.items():
        if part := re.match(r"(.*\.attentions\.\d+)\.(\w+)\.(weight|bias)$", key):
            key = f"{part[1]}.{ATTENTION.get(part[2], part[2])}.{part[3]}"
            value = value.flatten(1) if value.ndim == 4 else value
        elif re.search(r"\.attentions\.\d+\.", key) and value.ndim == 4:
            value = value.flatten(1)
        result[key] = value.float()
    return result
