"""`dinov2:` and `clip:`: embeddings of pictures by models of the transformers library, from a folder or by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.measuring.networks.base import Features
from training.models.pretrained import load_model, loading
from training.models.vision import side
from training.tensors import content_hash

HINT = "give a folder that holds config.json, model.safetensors and preprocessor_config.json"


@dataclass(frozen=True)
class Preprocessing:
    """uint8 RGB (B, 3, H, W) -> pixel_values (B, 3, size, size): bicubic, antialiased, clipped to [0, 255] without
    rounding, mean and std of [0, 1]. Whole pictures are squeezed to the square, as FD-DINOv2 and CMMD do; `crop` keeps
    their proportions and takes the centre, as CLIP does. The same for square pictures."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: bool = False

    def __call__(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        scale = self.size / min(height, width)
        to = (round(height * scale), round(width * scale)) if self.crop else (self.size, self.size)
        x = F.interpolate(pixels.float(), to, mode="bicubic", antialias=True).clamp(0, 255) / 255
        top, left = (to[0] - self.size) // 2, (to[1] - self.size) // 2
        x = x[..., top : top + self.size, left : left + self.size]
        mean, std = (torch.tensor(part, device=x.device).view(3, 1, 1) for part in (self.mean, self.std))
        return (x - mean) / std

    def __str__(self) -> str:
        kept = "centre cropped" if self.crop else "squeezed"
        mean, std = (",".join(f"{x:.4g}" for x in part) for part in (self.mean, self.std))
        return f"{self.size}x{self.size} bicubic, antialiased, {kept}; mean {mean}; std {std}"


def preprocessing(name: str, how: dict[str, Any], crop: bool = False) -> Preprocessing:
    """What `name`'s preprocessor_config.json states. ValueError where it states no size."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(name, **how)
    return Preprocessing(side(processor), tuple(processor.image_mean), tuple(processor.image_std), crop)


def load_dinov2(name: str, device: torch.device | str) -> Features:
    """`dinov2:DIR|NAME`: the class token after the last norm. FD-DINOv2 (Stein et al. 2023) where it is ViT-L/14.

    Raises UserError (exit 3) where it cannot be had or is no DINOv2.
    """
    with loading("DINOv2 model", name, HINT) as how:
        model, prepare = checked(load_model(name, {}, how), "dinov2"), preprocessing(name, how)
    config = model.config
    large = (config.hidden_size, config.num_hidden_layers, config.patch_size, prepare.size) == (1024, 24, 14, 224)
    shape = f"{config.num_hidden_layers} layers of {config.hidden_size}, patch {config.patch_size}"

    def token(values: Tensor) -> Tensor:
        found: Tensor = model(pixel_values=values).last_hidden_state[:, 0]
        return found

    names = {"frechet": "fd_dinov2"} if large else {}
    return _features("DINOv2", model, shape, config.hidden_size, prepare, token, names, device)


def load_clip(name: str, device: torch.device | str) -> Features:
    """`clip:DIR|NAME`: the projected embedding of a picture, of length 1. CMMD (Jayasumana et al. 2024) where it is
    ViT-L/14 of 336 pixels. Raises UserError (exit 3) where it cannot be had or is no CLIP."""
    with loading("CLIP model", name, HINT) as how:
        model, prepare = checked(load_model(name, {}, how), "clip"), preprocessing(name, how)
    vision = model.config.vision_config
    large = (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, prepare.size) == (1024, 24, 14, 336)
    shape = f"{vision.num_hidden_layers} layers of {vision.hidden_size}, patch {vision.patch_size}"

    def embedding(values: Tensor) -> Tensor:
        return F.normalize(model.visual_projection(model.vision_model(pixel_values=values).pooler_output), dim=-1)

    names = {"clip_mmd": "cmmd"} if large else {}
    return _features("CLIP", model, shape, model.config.projection_dim, prepare, embedding, names, device)


def checked(model: Any, kind: str) -> Any:
    """ValueError for a model of another kind: its numbers would bear a name that is not theirs."""
    if model.config.model_type != kind:
        raise ValueError(f"it is a {model.config.model_type} model, not {kind}")
    return model.eval().requires_grad_(False)


def _features(
    family: str,
    model: Any,
    shape: str,
    dim: int,
    prepare: Preprocessing,
    embed: Callable[[Tensor], Tensor],
    published: dict[str, str],
    device: torch.device | str,
) -> Features:
    model.to(device)
    weights = content_hash(model.state_dict())
    facts = {"weights": weights, "shape": shape, "preprocessing": str(prepare)}
    extract = lambda pixels: embed(prepare(pixels)).float()  # noqa: E731
    return Features(f"{family} {weights[:12]}, {shape}, {prepare.size}x{prepare.size}", dim, extract, facts, published)
