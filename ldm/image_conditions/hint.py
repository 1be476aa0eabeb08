"""Hints by further input channels: a denoiser that is shown edges, a depth map or a mask of the picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from ldm.image_conditions.base import Extras, ImageCondition, need_stored
from ldm.noise import Noise


@dataclass(frozen=True, kw_only=True)
class Hint(ImageCondition):
    """A hint in [0, 1] at the size of latents: the largest of the pixels that a latent covers, so that a bright edge of
    one pixel stays. `hint_channels`: 0, those of the hints that it is trained on; where their data do not tell, as
    many as the pictures have.

    All weights learn; an adapter (`adapter.kind = "controlnet"`) leaves the base as it is.
    """

    kind: Literal["hint"] = "hint"
    hint_channels: int = 0
    stored: ClassVar[str] = "pictures that were packed with --hint"
    drawn_with: ClassVar[str] = "generate --hint FILE"
    limits: ClassVar = {"hint_channels": "[0, inf)"}

    def channels(self, latent_channels: int, image_channels: int) -> int:
        """Those of the hint."""
        return self.hint_channels or image_channels

    def settled(self, hint_channels: int) -> Self:
        if hint_channels and self.hint_channels not in {0, hint_channels}:
            given = f"the hints of these latents have {hint_channels}"
            raise ValueError(f"image.hint_channels is {self.hint_channels}, {given}")
        return replace(self, hint_channels=hint_channels or self.hint_channels)

    def extras(self, latents: Tensor, stored: Mapping[str, Tensor], noise: Noise) -> Extras:
        return {**stored, **self.shown(need_stored(self, stored), (latents.shape[-2], latents.shape[-1]))}

    def fitted(self, extras: Mapping[str, Tensor], size: tuple[int, int]) -> Extras:
        return {**extras, **self.shown(extras["image"], size)} if "image" in extras else dict(extras)

    def shown(self, hint: Tensor, size: tuple[int, int]) -> Extras:
        """"image" of hints (B, C, H, W) in [0, 1] for latents of `size`."""
        return {"image": adaptive_max_pool2d(hint, size)}


IMAGE_CONDITIONS = (Hint,)
