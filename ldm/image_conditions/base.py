"""What every image condition is: the channels it adds to a backbone's input, and how training makes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from ldm.backbones.image import ImageInputs
from ldm.checks import Checked
from ldm.noise import Noise

Extras = dict[str, Tensor]


class ImageCondition(Checked, ABC):
    """The config of an image condition: a frozen dataclass with a `kind`.

    What it makes is `Cond.extras`, by name: "image" (B, `channels`, h, w), joined to the latents where a backbone reads
    them; and, where `told`, "image_level" (B,) in [0, 1], the level of the noise that the image was augmented with.
    `stored`: the flag of encode_latents that makes the `extra-image.npy` it is made of; "" where it is made of latents.
    `drawn_with`: the commands that give such an image.
    """

    told: ClassVar[bool] = False
    stored: ClassVar[str] = ""
    drawn_with: ClassVar[str] = ""

    @abstractmethod
    def channels(self, latent_channels: int, image_channels: int) -> int:
        """Input channels of the backbone besides the latents'; 0 where it reads none."""

    def settled(self, hint_channels: int) -> Self:
        """With what the data decide: the channels of the hints beside them, 0 where nothing tells. Raises ValueError
        for others than the config names."""
        return self

    def inputs(self, latent_channels: int, image_channels: int) -> ImageInputs:
        """What a backbone is built with; nothing where it reads no image."""
        channels = self.channels(latent_channels, image_channels)
        return {"image_channels": channels, "image_level": self.told} if channels else {}

    @abstractmethod
    def extras(self, latents: Tensor, stored: Mapping[str, Tensor], noise: Noise) -> Extras:
        """The extras of a batch that is trained or validated on: of its normalised latents (B, C, h, w) and of what the
        shards hold besides (`extra-NAME.npy`, uint8 ones in [0, 1]); every draw keyed by the `noise` of its sample.
        Raises ValueError where what is stored is missing or does not fit."""

    def drawn(self, latents: Tensor, stored: Mapping[str, Tensor], noise: Noise) -> Extras:
        """The same for held-out samples that are drawn, to be looked at."""
        return self.extras(latents, stored, noise)

    def fitted(self, extras: Mapping[str, Tensor], size: tuple[int, int]) -> Extras:
        """What is given for a drawing from latents of `size`, as the backbone reads it."""
        return dict(extras)

    def left_out(self, noise: Noise) -> tuple[Tensor, Tensor] | None:
        """Which samples (B,) are trained without their image, as zeros, and which of those without their caption too;
        None for none at all."""
        return None


@dataclass(frozen=True, kw_only=True)
class NoImage(ImageCondition):
    """Config of a denoiser that is told captions alone: what shards hold besides is handed on as it is."""

    kind: Literal["none"] = "none"

    def channels(self, latent_channels: int, image_channels: int) -> int:
        """None."""
        return 0

    def extras(self, latents: Tensor, stored: Mapping[str, Tensor], noise: Noise) -> Extras:
        """As stored."""
        return dict(stored)


def need_stored(condition: ImageCondition, stored: Mapping[str, Tensor]) -> Tensor:
    """What the shards hold as `extra-image.npy`. Raises ValueError, with the flag that makes it, where they do not."""
    if "image" not in stored:
        raise ValueError(f"image.kind {condition.kind} is made of extra-image.npy, which these latents do not hold: "
                         f"encode them with {condition.stored}")
    return stored["image"]


def without(extras: Mapping[str, Tensor], lost: Tensor) -> Extras:
    """With zeros in place of the image where `lost` (B,)."""
    image = extras["image"]
    return {**extras, "image": torch.where(lost.to(image.device)[:, None, None, None], 0, image)}


IMAGE_CONDITIONS = (NoImage,)
