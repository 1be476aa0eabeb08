"""diffusers' four classes of autoencoders, each read and written: its config.json, ours, and how tensors change.

A reader takes the settings of config.json (none of them null, scaling_factor among them) and the tensors; a writer
`[model]` of ours, the tensors without their normaliser, and its shift and scale, (C,) each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.errors import CHECKPOINT, UserError
from training.messages import note

Settings = dict[str, Any]
Tensors = dict[str, Tensor]
Reader = Callable[[Mapping[str, Any], Tensors], tuple[Settings, Tensors]]
Writer = Callable[[Settings, Tensors, Tensor, Tensor], tuple[Settings, Tensors]]

TILE = 32  # latents a side of a tile, where diffusers works in tiles: sample_size is as many pixels
# How a DC level is resampled; published models say "Conv".
RESAMPLED = {("pixel_unshuffle", "pixel_shuffle"): "shuffle", ("conv", "interpolate"): "conv"}
DC_FIXED = {"encoder_out_shortcut": True, "decoder_in_shortcut": True, "decoder_conv_act_fn": "relu",
            "attention_head_dim": 32}  # fmt: skip
TINY_FIXED = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2, "latent_magnitude": 3,
              "latent_shift": 0.5, "shift_factor": 0.0}  # fmt: skip
VQ_FIXED = {"norm_type": "group", "lookup_from_codebook": False}


def _foreign(said: str, hint: str) -> UserError:
    return UserError(f"{said} has no counterpart here", hint=hint, code=CHECKPOINT)


def _expect(about: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError at the first setting that is there and is another one: it would be another network."""
    for key, value in wanted.items():
        if about.get(key, value) != value:
            raise _foreign(f"{key} = {about[key]!r}", f"only {value!r} is read")


def _norm(shift: list[float], scale: list[float]) -> Tensors:
    """latents = (z - shift) / scale, of C channels."""
    rows = {"norm.shift": shift, "norm.scale": scale}
    return {key: torch.tensor(row, dtype=torch.float32).view(1, -1, 1, 1) for key, row in rows.items()}


def _factor(name: str, shift: Tensor, scale: Tensor) -> float:
    """scaling_factor = 1 / rms(scale). Where that is not the whole normaliser, says so."""
    rms = float(scale.double().square().mean().sqrt())
    if shift.any() or (scale != scale[0]).any():
        said = f"latents here are (z - shift) / scale of each channel, those of {name} z * scaling_factor"
        note(f"{said}: 1 / rms(scale) is written, {1 / rms:g}")
    return 1 / rms


def _read_blocks(about: Mapping[str, Any]) -> Settings:
    """What KL and VQ say alike. Raises UserError for blocks that only other programs have."""
    _expect(about, {"act_fn": "silu"})
    plain = ["AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D", "DownEncoderBlock2D", "UpDecoderBlock2D"]
    if odd := {*about["down_block_types"], *about["up_block_types"]} - {*plain}:
        raise _foreign(odd.pop(), f"known: {', '.join(plain)}")
    return {
        "channels": about["block_out_channels"],
        "blocks": about.get("layers_per_block", 1),
        "image_channels": about.get("in_channels", 3),
        "groups": about.get("norm_num_groups", 32),
        "mid_attention": about.get("mid_block_add_attention", True),
        "attention_at": [2**i for i, kind in enumerate(about["down_block_types"]) if kind.startswith("Attn")],
    }


def _write_blocks(model: Settings) -> Settings:
    levels = [2**i in model["attention_at"] for i in range(len(model["channels"]))]
    return {
        "act_fn": "silu",
        "block_out_channels": model["channels"],
        "down_block_types": ["AttnDownEncoderBlock2D" if there else "DownEncoderBlock2D" for there in levels],
        "up_block_types": ["AttnUpDecoderBlock2D" if there else "UpDecoderBlock2D" for there in reversed(levels)],
        "in_channels": model["image_channels"],
        "out_channels": model["image_channels"],
        "layers_per_block": model["blocks"],
        "norm_num_groups": model["groups"],
        "mid_block_add_attention": model["mid_attention"],
        "sample_size": TILE << len(levels) - 1,
        "force_upcast": False,
    }


def _read_kl(about: Mapping[str, Any], tensors: Tensors) -> tuple[Settings, Tensors]:
    width = about.get("latent_channels", 4)
    for name, size in (("quant_conv", 2 * width), ("post_quant_conv", width)):
        if f"{name}.weight" not in tensors:  # Stable Diffusion 3 and later leave them out: the identity
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.eye(size)[:, :, None, None], torch.zeros(size)
    shift, std = [about.get("shift_factor", 0.0)] * width, [1.0] * width
    if "latents_mean" in about and "latents_std" in about:  # pipelines use both or neither
        shift, std = about["latents_mean"], about["latents_std"]
    norm = _norm(shift, [value / about["scaling_factor"] for value in std])
    return {"kind": "kl", **_read_blocks(about), "latent_channels": width}, tensors | norm


def _write_kl(model: Settings, tensors: Tensors, shift: Tensor, scale: Tensor) -> tuple[Settings, Tensors]:
    """The normaliser is folded into the 1x1 convolutions, since pipelines know one number only."""
    fold(tensors, shift, scale)
    own = {"latent_channels": model["latent_channels"], "scaling_factor": 1.0, "shift_factor": 0.0,
           "use_quant_conv": True, "use_post_quant_conv": True}  # fmt: skip
    return _write_blocks(model) | own, tensors


def fold(tensors: Tensors, shift: Tensor, scale: Tensor) -> None:
    """Put z' = (z - shift) / scale into the convolutions around z, (C,) each: what they give and take is z'."""
    width = len(scale)
    weight, bias = tensors["quant_conv.weight"], tensors["quant_conv.bias"]
    weight[:width] /= scale[:, None, None, None]
    bias[:width] = (bias[:width] - shift) / scale
    bias[width:] -= 2 * scale.log()
    weight, bias = tensors["post_quant_conv.weight"], tensors["post_quant_conv.bias"]
    bias += weight[:, :, 0, 0] @ shift
    weight *= scale[None, :, None, None]


def _read_vq(about: Mapping[str, Any], tensors: Tensors) -> tuple[Settings, Tensors]:
    _expect(about, VQ_FIXED)
    codes = tensors["quantize.embedding.weight"]
    model = {"kind": "vq", **_read_blocks(about), "encoder_channels": about.get("latent_channels", 3)}
    model |= {"codes": len(codes), "latent_channels": codes.shape[1]}
    return model, tensors | _norm([0.0], [1 / about["scaling_factor"]])


def _write_vq(model: Settings, tensors: Tensors, shift: Tensor, scale: Tensor) -> tuple[Settings, Tensors]:
    """Of the codebook the codes alone. The nearest of codes of length 1 does not depend on the length of z."""
    codes = tensors["quantize.embedding.weight"]
    tensors = {key: value for key, value in tensors.items() if not key.startswith("quantize.")}
    if model["normalize"]:
        note("latents that VQModel encodes are as here but for their length; it is not 1")
        codes = F.normalize(codes, dim=1)
    own = {"latent_channels": model["encoder_channels"], "num_vq_embeddings": model["codes"],
           "vq_embed_dim": model["latent_channels"], "scaling_factor": _factor("VQModel", shift, scale)}  # fmt: skip
    return _write_blocks(model) | VQ_FIXED | own, tensors | {"quantize.embedding.weight": codes}


def _read_tiny(about: Mapping[str, Any], tensors: Tensors) -> tuple[Settings, Tensors]:
    _expect(about, TINY_FIXED)
    widths = {*about["encoder_block_out_channels"], *about["decoder_block_out_channels"]}
    if len(widths) > 1:
        raise _foreign(f"a network of widths {sorted(widths)}", "only one width is read")
    width = about["latent_channels"]
    model = {"kind": "tiny", "width": widths.pop(), "latent_channels": width, "image_channels": about["in_channels"],
             "encoder_blocks": about["num_encoder_blocks"], "decoder_blocks": about["num_decoder_blocks"]}  # fmt: skip
    return model, tensors | _norm([0.0] * width, [1 / about["scaling_factor"]] * width)


def _write_tiny(model: Settings, tensors: Tensors, shift: Tensor, scale: Tensor) -> tuple[Settings, Tensors]:
    widths = [model["width"]] * len(model["encoder_blocks"])
    settings = {"in_channels": model["image_channels"], "out_channels": model["image_channels"],
           "encoder_block_out_channels": widths, "decoder_block_out_channels": widths, "force_upcast": False,
           "num_encoder_blocks": model["encoder_blocks"], "num_decoder_blocks": model["decoder_blocks"],
           "latent_channels": model["latent_channels"],
           "scaling_factor": _factor("AutoencoderTiny", shift, scale)}  # fmt: skip
    return TINY_FIXED | settings, tensors


def _read_dc(about: Mapping[str, Any], tensors: Tensors) -> tuple[Settings, Tensors]:
    halves = ("block_types", "block_out_channels", "qkv_multiscales")
    _expect(about, DC_FIXED | {f"decoder_{key}": about[f"encoder_{key}"] for key in halves})
    channels, width = about["encoder_block_out_channels"], about["latent_channels"]
    attention = [kind == "EfficientViTBlock" for kind in _each(about["encoder_block_types"], len(channels))]
    scales = {tuple(s) for s, attends in zip(about["encoder_qkv_multiscales"], attention, strict=True) if attends}
    if len(scales) > 1:
        raise _foreign(f"encoder_qkv_multiscales = {about['encoder_qkv_multiscales']!r}", "one for all levels is read")
    ends = about["downsample_block_type"], about["upsample_block_type"]
    if (resample := RESAMPLED.get((ends[0].lower(), ends[1].lower()))) is None:
        raise _foreign("downsample_block_type = {!r} with upsample_block_type = {!r}".format(*ends), f"{[*RESAMPLED]}")
    model = {"kind": "dc", "channels": channels, "image_channels": about["in_channels"], "latent_channels": width,
             "encoder_blocks": about["encoder_layers_per_block"], "decoder_blocks": about["decoder_layers_per_block"],
             "attention_at": [2**i for i, attends in enumerate(attention) if attends], "resample": resample,
             "batch_norm_at": _batch_norms(about, attention)}  # fmt: skip
    model |= {"scales": scales.pop()} if scales else {}
    return model, tensors | _norm([0.0] * width, [1 / about["scaling_factor"]] * width)


def _each(setting: Any, levels: int) -> list[Any]:
    """A setting for all levels, or one for each."""
    return [setting] * levels if isinstance(setting, str) else list(setting)


def _batch_norms(about: Mapping[str, Any], attention: list[bool]) -> list[int]:
    """The factors of decoder levels with batch norm. Raises UserError for levels of a third kind."""
    norms, acts = (_each(about[f"decoder_{key}"], len(attention)) for key in ("norm_types", "act_fns"))
    for attends, norm, act in zip(attention, norms, acts, strict=True):
        if (norm, act) not in (("rms_norm", "silu"), ("batch_norm", "relu")) or (attends and norm != "rms_norm"):
            said = f"decoder_norm_types {norm!r} with decoder_act_fns {act!r}{' and attention' if attends else ''}"
            raise _foreign(said, "rms_norm with silu is read, and batch_norm with relu where there is no attention")
    return [2**i for i, norm in enumerate(norms) if norm == "batch_norm"]


def _write_dc(model: Settings, tensors: Tensors, shift: Tensor, scale: Tensor) -> tuple[Settings, Tensors]:
    levels = [2**i for i in range(len(model["channels"]))]
    odd = [level in model["batch_norm_at"] for level in levels]
    halves = {"block_types": ["EfficientViTBlock" if n in model["attention_at"] else "ResBlock" for n in levels],
              "block_out_channels": model["channels"],
              "qkv_multiscales": [model["scales"] if n in model["attention_at"] else [] for n in levels]}  # fmt: skip
    down, up = next(ends for ends, resample in RESAMPLED.items() if resample == model["resample"])
    settings = {"in_channels": model["image_channels"], "latent_channels": model["latent_channels"],
           "encoder_layers_per_block": model["encoder_blocks"], "decoder_layers_per_block": model["decoder_blocks"],
           "downsample_block_type": down, "upsample_block_type": up,
           "decoder_norm_types": ["batch_norm" if there else "rms_norm" for there in odd],
           "decoder_act_fns": ["relu" if there else "silu" for there in odd],
           "scaling_factor": _factor("AutoencoderDC", shift, scale)}  # fmt: skip
    settings |= {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in halves.items()}
    return DC_FIXED | settings, tensors


# Each class, the scaling_factor of its files that state none, and its two ways.
LAYOUTS: dict[str, tuple[str, float, Reader, Writer]] = {
    "AutoencoderKL": ("kl", 0.18215, _read_kl, _write_kl),
    "VQModel": ("vq", 0.18215, _read_vq, _write_vq),
    "AutoencoderTiny": ("tiny", 1.0, _read_tiny, _write_tiny),
    "AutoencoderDC": ("dc", 1.0, _read_dc, _write_dc),
}
