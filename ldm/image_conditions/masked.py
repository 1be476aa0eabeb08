"""Inpainting that is trained: a denoiser that is shown which latents are to be made anew, and all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.image_conditions.base import Extras, ImageCondition
from ldm.noise import Noise

CORNERS = 5  # of a stroke


@dataclass(frozen=True, kw_only=True)
class Masked(ImageCondition):
    """The mask, 1 in the hole, and behind it the latents with zeros there: C + 1 channels, in the order of Stable
    Diffusion's inpainting models (Rombach et al. 2022, sec. 4.5).

    In training a mask is drawn for each sample, at the size of latents: the whole picture with the chance `whole`, as
    in those models; a stroke with the chance `strokes`; else a box. A box has sides of `smallest` to `largest` of the
    picture's, uniformly, and lies anywhere in it. A stroke runs over five points anywhere, and is up to a quarter of
    the picture wide.
    """

    kind: Literal["masked"] = "masked"
    whole: float = 0.25
    strokes: float = 0.25
    smallest: float = 0.2
    largest: float = 0.8
    drawn_with: ClassVar[str] = "generate --image FILE --mask FILE"
    limits: ClassVar = {"whole": "[0, 1]", "strokes": "[0, 1]", "smallest": "(0, 1]", "largest": "[smallest, 1]"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.whole + self.strokes > 1:
            raise ValueError(f"masked whole ({self.whole}) and strokes ({self.strokes}) must not exceed 1 together")

    def channels(self, latent_channels: int, image_channels: int) -> int:
        """One of the mask, and those of the latents."""
        return latent_channels + 1

    def extras(self, latents: Tensor, stored: Mapping[str, Tensor], noise: Noise) -> Extras:
        return {**stored, **self.shown(latents, self.holes(noise, latents.shape[-2], latents.shape[-1]))}

    def shown(self, latents: Tensor, hole: Tensor) -> Extras:
        """"image" of normalised latents (B or 1, C, h, w) and the hole (B or 1, 1, h, w), bool: what is made anew."""
        hole = hole.to(latents.device)
        known = torch.where(hole, 0, latents)
        return {"image": torch.cat([hole.to(latents.dtype).expand(len(known), *hole.shape[1:]), known], dim=1)}

    def holes(self, noise: Noise, height: int, width: int) -> Tensor:
        """Masks (B, 1, height, width), bool, each keyed by the noise of its sample; at least one latent is in each."""
        kind = noise.uniform((1,), "mask-kind")[:, :, None]
        box, stroke = (draw(noise, height, width) for draw in (self._boxes, _strokes))
        hole = torch.where(kind < self.whole + self.strokes, stroke, box) | (kind < self.whole)
        return hole[:, None].to(noise.seeds.device)

    def _boxes(self, noise: Noise, height: int, width: int) -> Tensor:
        sides, places = noise.uniform((2, 2), "mask-box").unbind(1)
        sides = self.smallest + (self.largest - self.smallest) * sides
        starts = places * (1 - sides)

        def within(axis: int, count: int) -> Tensor:
            cells = torch.arange(count, device=sides.device)
            start, side = count * starts[:, axis, None], count * sides[:, axis, None]
            return (cells + 1 > start) & (cells < start + side)

        return within(0, height)[:, :, None] & within(1, width)[:, None]


def _strokes(noise: Noise, height: int, width: int) -> Tensor:
    """Cells (B, height, width) no farther from a line over `CORNERS` points than its half-width and half a cell."""
    points = noise.uniform((CORNERS, 2), "mask-stroke")
    half = noise.uniform((1, 1), "mask-width") / 8 + 0.5 / min(height, width)
    rows, columns = ((torch.arange(count, device=points.device) + 0.5) / count for count in (height, width))
    cells = torch.cartesian_prod(rows, columns)
    first, along = points[:, :-1, None], points.diff(dim=1)[:, :, None]  # (B, CORNERS - 1, 1, 2)
    from_first = cells - first
    share = ((from_first * along).sum(-1) / along.square().sum(-1).clamp(min=1e-12)).clamp(0, 1)
    distance = (from_first - share[..., None] * along).square().sum(-1).sqrt().amin(1)
    return (distance <= half[:, 0]).view(-1, height, width)


IMAGE_CONDITIONS = (Masked,)
