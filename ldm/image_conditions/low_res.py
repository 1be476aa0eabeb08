"""Super-resolution: a denoiser that is shown a small version of the picture, and told how much noise is in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.image_conditions.base import Extras, ImageCondition, need_stored
from ldm.noise import Noise


@dataclass(frozen=True, kw_only=True)
class LowRes(ImageCondition):
    """The picture, `factor` times smaller, y' = (1 - u) y + u n with noise n of its own size, at the size of latents.

    In training u ~ U(0, `augment`), and the network is told it; in drawing u is `level`. So that the network also
    believes a picture that another model drew: conditioning augmentation, Ho et al. 2021 (arXiv 2106.15282), sec. 4.2,
    on the path of `flow`. u = 0 leaves y, and at u = 1 nothing of y is left. Enlarged by PIL's bicubic kernel where
    latents are larger, as by an `identity` autoencoder; with one of the same factor they are its pixels as they are.
    """

    kind: Literal["low-res"] = "low-res"
    factor: int = 4
    augment: float = 1.0
    level: float = 0.2
    told: ClassVar[bool] = True
    stored: ClassVar[str] = "--low-res FACTOR"
    drawn_with: ClassVar[str] = "upscale FILE, or generate --cascade BASE --cascade RUN"
    limits: ClassVar = {"factor": "[2, inf)", "augment": "[0, 1]", "level": "[0, augment]"}

    def channels(self, latent_channels: int, image_channels: int) -> int:
        """Those of the pictures."""
        return image_channels

    def extras(self, latents: Tensor, stored: Mapping[str, Tensor], noise: Noise) -> Extras:
        small = 2 * need_stored(self, stored) - 1
        u = (self.augment * noise.uniform((1,), "image-level")[:, 0]).to(small.device, small.dtype)
        return {**stored, **self.shown(small, (latents.shape[-2], latents.shape[-1]), u, noise)}

    def shown(self, small: Tensor, size: tuple[int, int], level: Tensor, noise: Noise) -> Extras:
        """"image" and "image_level" of small pictures (B, C, H, W) in [-1, 1], for latents of `size`, with noise of
        `level` (B,). Raises ValueError where latents are smaller than they are."""
        if small.shape[-2] > size[0] or small.shape[-1] > size[1]:
            raise ValueError(f"a picture of {small.shape[-2]}x{small.shape[-1]} would lose pixels in latents of "
                             f"{size[0]}x{size[1]}: make it smaller, by a factor of at least the autoencoder's")
        u, n = level[:, None, None, None], noise.normal(small.shape[1:], "image-noise", dtype=small.dtype)
        image = (1 - u) * small + u * n.to(small.device)
        if image.shape[-2:] != size:
            image = interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
        return {"image": image, "image_level": level}

    def drawn(self, latents: Tensor, stored: Mapping[str, Tensor], noise: Noise) -> Extras:
        small = 2 * need_stored(self, stored) - 1
        level = torch.full((len(small),), self.level, device=small.device)
        return {**stored, **self.shown(small, (latents.shape[-2], latents.shape[-1]), level, noise)}


IMAGE_CONDITIONS = (LowRes,)
