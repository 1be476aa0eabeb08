"""Editing by instruction: a denoiser that is shown the picture to be changed, and told in words how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Around, Conditional
from ldm.diffusion import Denoised
from ldm.guiding import together
from ldm.image_conditions.base import Extras, ImageCondition, need_stored
from ldm.noise import Noise


@dataclass(frozen=True, kw_only=True)
class Source(ImageCondition):
    """The mean latents of the picture to be changed: InstructPix2Pix, Brooks et al. 2023 (arXiv 2211.09800).

    For guidance by the picture, `image_dropout` of the samples are trained without it, zeros in its place, and
    `both_dropout` without their caption as well; `conditioning.dropout` are without their caption alone.
    """

    kind: Literal["source"] = "source"
    image_dropout: float = 0.05
    both_dropout: float = 0.05
    stored: ClassVar[str] = "--encode-hint"
    drawn_with: ClassVar[str] = "generate --image FILE"
    limits: ClassVar = {"image_dropout": "[0, 1]", "both_dropout": "[0, 1]"}

    def channels(self, latent_channels: int, image_channels: int) -> int:
        """Those of the latents."""
        return latent_channels

    def extras(self, latents: Tensor, stored: Mapping[str, Tensor], noise: Noise) -> Extras:
        source = need_stored(self, stored)
        if source.shape != latents.shape:
            sizes = ("x".join(map(str, part.shape[1:])) for part in (source, latents))
            raise ValueError("extra-image.npy is {}, latents are {}: encode them with {}".format(*sizes, self.stored))
        return dict(stored)

    def left_out(self, noise: Noise) -> tuple[Tensor, Tensor]:
        drawn = noise.uniform((1,), "image-dropout")[:, 0]
        return drawn < self.both_dropout + self.image_dropout, drawn < self.both_dropout


@dataclass(frozen=True, repr=False)
class ImageGuided(Around):
    """D'(x, c) = D(x, c) + (scale - 1) (D(x, image) - D(x, nothing)), both without words, for guidance around it.

    Under classifier-free guidance by s_T that is InstructPix2Pix's D(nothing) + scale (D(image) - D(nothing)) +
    s_T (D(image, words) - D(image)), eq. 3. `null`: the empty caption, batch 1. A call is one of three times the batch;
    scale 1 is the denoiser itself. Raises ValueError, when it is called at another, for a condition without an image.
    """

    denoiser: Conditional
    null: Cond
    scale: float = 1.5

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        if self.scale == 1:
            return self.denoiser(x, t, cond)
        if (picture := cond.image) is None:
            raise ValueError("image_scale guides by the extra 'image', and none is given: give one, or set it to 1")
        shown = cond.absence(self.null)
        blank = shown._replace(extras={**shown.extras, "image": torch.zeros_like(picture)})
        told, image, nothing = together(self.denoiser, [cond, shown, blank])(x, t)
        return told._replace(x0=told.x0 + (self.scale - 1) * (image.x0 - nothing.x0),
                             eps=told.eps + (self.scale - 1) * (image.eps - nothing.eps))


IMAGE_CONDITIONS = (Source,)
