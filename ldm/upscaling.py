"""Pictures made larger by a model that is shown them: a task for `Pipeline.pixels`, and how true it stays to them.

    pipeline(captions, task=upscaling(pipeline, pictures))

A picture x is true to a small one y where A x = y, A the mean over squares of pixels: a residual in 255ths tells how
far off it is, and `projected` removes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from autoencoder.identity import IdentityAutoencoder
from autoencoder.images import to_unit
from ldm.denoiser import Denoise
from ldm.image_conditions.low_res import LowRes
from ldm.image_tasks import Pictures, as_pixels
from ldm.inverse.measurement import DDNM
from ldm.inverse.operators import Box
from ldm.noise import Noise
from ldm.pipeline import Pipeline
from ldm.tasks import Task, Tasks, unheld
from ldm.windowed import in_windows

HALVINGS = 24  # from 510 to less than float32 tells of 255


def upscaling(pipeline: Pipeline, pictures: Pictures, *, level: float | None = None,
              consistent: bool = False) -> Tasks:
    """The pictures, larger by the factor of the pipeline's `low-res` condition: one for all captions, or one each, all
    of one size.

    `level`: the noise that is added to them and told to the network (`level_of`). Sides that the model has no canvas
    for are reflected up to one, and cut again. `consistent`: every step in pixels, and the finished picture, is brought
    to what the small one says (DDNM). Larger pictures than the trained ones are drawn by the pipeline `in_windows`.
    Raises ValueError for a level that the model was not trained with, and for a model without that condition.
    """
    condition, small = low_res_of(pipeline), as_pixels(pipeline, pictures)
    factor, u = condition.factor, level_of(pipeline, level)
    height, width = canvas(pipeline, (small.shape[-2], small.shape[-1]))
    whole = reflected(small, (height, width))
    shape = pipeline.latent_shape((height * factor, width * factor))
    pixels, operator = isinstance(pipeline.autoencoder, IdentityAutoencoder), Box(factor=factor)

    def task(part: slice) -> Task:
        source, y = (given if len(given) == 1 else given[part] for given in (small, to_unit(whole)))

        def extras(noise: Noise) -> Mapping[str, Tensor]:
            shown = y.expand(len(noise), *y.shape[1:])
            levels = torch.full((len(noise),), u, dtype=y.dtype, device=y.device)
            return condition.shown(shown, shape[1:], levels, noise.fold("upscaling"))

        def hold(denoise: Denoise) -> Denoise:
            return DDNM()(denoise, operator, y, 0.0)

        def finish(made: Tensor) -> Tensor:
            cut = made[..., : source.shape[-2] * factor, : source.shape[-1] * factor]
            return projected(cut, source, factor) if consistent else cut

        return Task(shape=shape, extras=extras, hold=hold if consistent and pixels else unheld, finish=finish)

    return task


def low_res_of(pipeline: Pipeline) -> LowRes:
    """The condition of a model that enlarges pictures. Raises ValueError for one that was trained with another."""
    if not isinstance(pipeline.image, LowRes):
        raise ValueError(f"this model was trained with image.kind {pipeline.image.kind}, and enlarges no pictures: "
                         "give one of image.kind low-res")
    return pipeline.image


def level_of(pipeline: Pipeline, level: float | None) -> float:
    """The level of noise on small pictures, None being the condition's own. Raises ValueError for one that is not in
    [0, augment]."""
    condition = low_res_of(pipeline)
    u = condition.level if level is None else level
    if not 0 <= u <= condition.augment:
        raise ValueError(f"the level of noise on a small picture must lie in [0, {condition.augment:g}], which this "
                         f"model was trained with, got {u:g}")
    return u


def canvas(pipeline: Pipeline, size: tuple[int, int]) -> tuple[int, int]:
    """The least sides of a small picture that the model can be shown: those of `size` = (height, width), up to the
    trained ones, and to what the pipeline's multiple divides once enlarged."""
    factor = low_res_of(pipeline).factor
    step = pipeline.multiple // math.gcd(pipeline.multiple, factor)
    height, width = (-(-max(side, trained // factor) // step) * step
                     for side, trained in zip(size, pipeline.size, strict=True))
    return height, width


def reflected(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures (B, C, H, W) continued to the right and below by their reflection, as often as it takes."""
    rows, columns = (_mirrored(side, wanted) for side, wanted in zip(pixels.shape[-2:], size, strict=True))
    return pixels[..., rows, :][..., columns]


def _mirrored(side: int, wanted: int) -> Tensor:
    """0, 1, ..., side - 1, side - 2, ..., 0, 1, ... of `wanted` numbers."""
    place = torch.arange(wanted) % max(1, 2 * side - 2)
    return torch.minimum(place, (2 * side - 2 - place).abs())


def projected(made: Tensor, small: Tensor, factor: int) -> Tensor:
    """The pixels nearest to `made` whose means over squares are those of `small`, all uint8.

    clip(x + c) with the c of each square that gives its mean, by halving: the Euclidean projection onto what is
    consistent and in range; without the range it is the back-projection x + A^+ (y - A x), Irani & Peleg 1991. Of the
    pixels of a square as many are rounded up as its mean needs, those with the largest fractions.
    """
    squares, y = made.float().unfold(2, factor, factor).unfold(3, factor, factor), small.float()
    x = squares.flatten(-2)
    low, high = torch.full_like(y, -255), torch.full_like(y, 255)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        short = (x + middle[..., None]).clamp(0, 255).mean(-1) < y
        low, high = middle.where(short, low), high.where(short, middle)
    moved = (x + high[..., None]).clamp(0, 255)
    down = moved.floor()
    up = (factor**2 * y - down.sum(-1)).round()
    rank = (moved - down).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    whole = (down + (rank < up[..., None])).clamp(max=255).view_as(squares)
    return whole.transpose(3, 4).reshape(made.shape).to(torch.uint8)


def residual(made: Tensor, small: Tensor, factor: int) -> Tensor:
    """mean |y - A x| of uint8 pictures (B, C, f h, f w) and their small ones, in 255ths, (B,)."""
    off = small.float() - Box(factor=factor)(made.float())
    return off.abs().flatten(1).mean(1)


def larger(pipeline: Pipeline, stride: int | None, size: tuple[int, int]) -> Pipeline:
    """The pipeline for small pictures of `size`: in windows of the trained size where they are larger, `stride` latents
    apart, None being half of a window; 0 draws them whole."""
    (_, height, width), factor = pipeline.latent_shape(pipeline.size), low_res_of(pipeline).factor
    apart = max(1, min(height, width) // 2) if stride is None else stride
    fits = all(side * factor <= trained for side, trained in zip(size, pipeline.size, strict=True))
    return pipeline if fits else in_windows(pipeline, apart)
