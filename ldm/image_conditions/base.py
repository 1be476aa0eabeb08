"""What every image condition is: the channels it adds to a backbone's input, and how training makes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ldm.checks import Checked
from ldm.noise import Noise


class ImageCondition(Checked, ABC):
    """The config of an image condition: a frozen dataclass with a `kind`.

    What it makes is `Cond.extras`, by name: "image" (B, `channels`, h, w), joined to the latents where a backbone reads
    them; and, where `told`, "image_level" (B,) in [0, 1], the level of the noise that the image was augmented with.
    """

    told: bool = False

    @abstractmethod
    def channels(self, latent_channels: int, image_channels: int) -> int:
        """Input channels of the backbone besides the latents'; 0 where it reads none."""

    @abstractmethod
    def extras(self, latents: Tensor, stored: Mapping[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        """The extras of a training batch: of its normalised latents (B, C, h, w) and of what the shards hold besides
        (`extra-NAME.npy`, uint8 ones in [0, 1]); every draw keyed by the `noise` of its sample."""


@dataclass(frozen=True, kw_only=True)
class NoImage(ImageCondition):
    """Config of a denoiser that is told captions alone: what shards hold besides is handed on as it is."""

    kind: Literal["none"] = "none"

    def channels(self, latent_channels: int, image_channels: int) -> int:
        """None."""
        return 0

    def extras(self, latents: Tensor, stored: Mapping[str, Tensor], noise: Noise) -> dict[str, Tensor]:
        """As stored."""
        return dict(stored)


IMAGE_CONDITIONS = (NoImage,)
