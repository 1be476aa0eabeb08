"""Small autoencoders of diffusers' and of ours, and the script that turns one into the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from autoencoder.base import Autoencoder
from training.models.folders import export
from training.settings import decoding

diffusers: Any = pytest.importorskip("diffusers")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
FILE = "diffusion_pytorch_model.safetensors"


def convert(verb: str, source: object, output: Path, *words: object) -> Path:
    """scripts/convert_autoencoder.py; returns `output`."""
    assert tiny.call("convert_autoencoder", verb, source, "--output", output, *words) == 0
    return output


def images(channels: int = 3) -> Tensor:
    """Two pictures, of sides that factors up to 8 divide."""
    return torch.rand(2, channels, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def kl(**changes: Any) -> Any:
    """diffusers' KL autoencoder of two levels."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, **blocks}
    return diffusers.AutoencoderKL(**shape | changes).eval()


def vq(**changes: Any) -> Any:
    """diffusers' VQ autoencoder of two levels."""
    torch.manual_seed(0)
    peer = diffusers.VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, vq_embed_dim=2,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=32, **{"scaling_factor": 0.5} | changes,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(peer.quantize.embedding.weight, std=0.3)
    return peer


def small(**changes: Any) -> Any:
    """diffusers' tiny autoencoder of two levels."""
    torch.manual_seed(0)
    shape = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "scaling_factor": 0.5,
             "num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1), "latent_channels": 2}  # fmt: skip
    return diffusers.AutoencoderTiny(**shape | changes).eval()


def deep(**changes: Any) -> Any:
    """diffusers' deep-compression autoencoder of three levels, two of them with attention."""
    torch.manual_seed(0)
    kinds, scales = ("ResBlock", "EfficientViTBlock", "EfficientViTBlock"), ((), (5,), (5,))
    shape = {"encoder_block_types": kinds, "decoder_block_types": kinds, "encoder_block_out_channels": (8, 32, 32),
             "decoder_block_out_channels": (8, 32, 32), "encoder_layers_per_block": (0, 1, 2), "latent_channels": 4,
             "decoder_layers_per_block": (1, 1, 1), "encoder_qkv_multiscales": scales, "scaling_factor": 0.5,
             "decoder_qkv_multiscales": scales}  # fmt: skip
    return used(diffusers.AutoencoderDC(**shape | changes).eval())


def used(network: torch.nn.Module) -> Any:
    """With the statistics of batch norms as training leaves them."""
    for module in network.modules():
        if isinstance(variance := getattr(module, "running_var", None), Tensor):
            torch.nn.init.normal_(module.running_mean, 0.1, 0.3)  # type: ignore[arg-type]
            torch.nn.init.uniform_(variance, 0.2, 3.0)
    return network


def stored(home: Path, model: dict[str, Any], shift: float = 0.7, spread: float = 2.0) -> tuple[Path, Autoencoder]:
    """A model folder of ours with seeded weights; shifts of its latents up to `shift`, scales from 0.5 to `spread`."""
    config = decoding.decode("autoencoder", {"model": model})
    torch.manual_seed(0)
    network = config.model.build()  # type: ignore[union-attr]
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    count = network.norm.shift.numel()
    network.norm.set_(torch.linspace(-shift, shift, count), torch.linspace(0.5, spread, count))
    export(home, decoding.to_values(config), used(network).state_dict(), {})
    return home, network.eval()


LDM_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "group_norm": "norm", "to_out.0": "proj_out"}


def in_ldm_names(tensors: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The other way round from what is tested, spelled out by hand."""
    swaps = [
        ("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2."),
        ("mid_block.attentions.0.", "mid.attn_1."), ("conv_norm_out.", "norm_out."),
        ("conv_shortcut.", "nin_shortcut."),
    ]  # fmt: skip
    for i in range(levels):
        for half, at in (("down", i), ("up", levels - 1 - i)):
            swaps += [(f"{half}_blocks.{i}.resnets.", f"{half}.{at}.block."),
                      (f"{half}_blocks.{i}.attentions.", f"{half}.{at}.attn."),
                      (f"{half}_blocks.{i}.{half}samplers.0.", f"{half}.{at}.{half}sample.")]  # fmt: skip
    found = {}
    for key, value in tensors.items():
        for ours, ldm in swaps:
            key = key.replace(ours, ldm)
        if ".attn" in key:
            for ours, ldm in LDM_ATTENTION.items():
                key = key.replace(f".{ours}.", f".{ldm}.")
            value = value[:, :, None, None] if value.ndim == 2 else value
        found[key] = value.contiguous()
    return found
