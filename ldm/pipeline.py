"""Captions and seeds in, pictures out: the one place where stage two meets the autoencoder's decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoencoder.base import Autoencoder
from autoencoder.images import to_uint8
from autoencoder.tiles import decode_tiled, encode_tiled
from ldm.composition import beside
from ldm.conditioning import Cond
from ldm.denoiser import Conditional, Denoise, Denoiser
from ldm.grids import Grid
from ldm.guiding import Guidance, Helpers
from ldm.noise import Noise
from ldm.samplers import DDIMInversion, Sampler, Snapshot, prior, sample
from ldm.text import TextEncoder

Captions = str | Sequence[str]  # one, or one per picture
Also = Sequence[tuple[str, float]]  # further captions of every picture, each with its weight


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are made: solver, its steps and the times it visits, and what steers it."""

    sampler: Sampler
    grid: Grid
    guidance: Guidance
    steps: int = 25


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A trained run, ready to draw: `pipeline(["a red circle"], seeds=[0])` gives PIL images.

    A picture depends on its caption, its seed and the settings alone, not on its batch: the noise is keyed by the seed,
    bit for bit. `size`: pixels (height, width). `weak`: the poorer model of autoguidance. `judge`, for classifier
    guidance: log p(caption | image) (B,) of images (B,3,H,W) in [-1, 1] and their captions. `tile`, 0 or at least 16:
    the side, in latents, of the overlapping tiles that the autoencoder works in, so that its memory is that of one
    tile; 0, the whole picture at once (`autoencoder.tiles` says where they are equal). Nothing of it changes:
    `dataclasses.replace(pipeline, tile=16)` is another. Raises ValueError where the schedule has no such grid of so
    many steps.
    """

    autoencoder: Autoencoder
    denoiser: Denoiser
    text: TextEncoder
    sampling: Sampling
    size: tuple[int, int]
    weak: Conditional | None = None
    judge: Callable[[Tensor, Sequence[str]], Tensor] | None = None
    tile: int = 0

    def __post_init__(self) -> None:
        self.sampling.grid(self.sampling.steps, self.denoiser.schedule)

    @property
    def device(self) -> torch.device:
        """Where the decoder lives."""
        return next(self.autoencoder.parameters()).device

    def __call__(self, captions: Captions, seeds: int | Sequence[int] = 0, **settings: Any) -> list[Any]:
        """One PIL image per caption, grey, RGB or RGBA by the autoencoder's channels.

        `seeds`: one each, or the first of a run; `settings`: as `pixels` takes them.
        """
        from PIL import Image

        pixels = torch.cat(list(self.pixels(captions, seeds, **settings)))
        grey = pixels.shape[1] == 1
        return [Image.fromarray(p[..., 0] if grey else p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    def pixels(self, captions: Captions, seeds: int | Sequence[int] = 0, *, negative: Captions = "", also: Also = (),
               start: Tensor | None = None, sampling: Sampling | None = None, size: tuple[int, int] | None = None,
               batch_size: int = 64, watch: Callable[[Snapshot], None] | None = None) -> Iterator[Tensor]:
        """uint8 (b,C,H,W) batch by batch, in the order of the captions, so that any number of pictures streams.

        `captions`: one string is one picture; `negative`: what guidance moves away from (one, or one per caption);
        `also`: further captions for every picture, each with its weight (`ldm.composition`); `start`: latents of t = 1
        to begin from, as `invert` gives them (one, or one per caption); `size`: pixels (height, width). Raises
        ValueError, before anything is drawn, for a size that does not fit, and where what is given per caption is
        more or fewer than there are captions.
        """
        captions = _each(captions)
        seeds = list(range(seeds, seeds + len(captions))) if isinstance(seeds, int) else list(seeds)
        negatives = [negative] * len(captions) if isinstance(negative, str) else list(negative)
        if start is not None and len(start) == 1:
            start = start.expand(len(captions), *start.shape[1:])
        for given, name in ((seeds, "seeds"), (negatives, "negative prompts"), (start, "starts")):
            if given is not None and len(given) != len(captions):
                raise ValueError(f"{len(captions)} captions but {len(given)} {name}: give one, or one each.")
        if any(isinstance(pair, str) or len(pair) != 2 for pair in also):
            raise ValueError("`also` takes pairs of a caption and its weight.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        shape = self.latent_shape(size or self.size)
        if start is not None and tuple(start.shape[1:]) != shape:
            raise ValueError(f"a start of {tuple(start.shape[1:])} is not the {shape} of these pictures' latents.")

        @torch.no_grad()
        def drawn() -> Iterator[Tensor]:
            plan = sampling or self.sampling
            for first in range(0, len(captions), batch_size):
                part = slice(first, first + batch_size)
                denoise = self.guided(captions[part], negatives[part], also, plan)
                noise = Noise.from_seeds(seeds[part], self.device)
                own = None if start is None else start[part]
                yield to_uint8(self.decode(self.latents(denoise, noise, shape, plan, own, watch)))

        return drawn()

    def latents(self, denoise: Denoise, noise: Noise, shape: tuple[int, ...], plan: Sampling,
                start: Tensor | None = None, watch: Callable[[Snapshot], None] | None = None) -> Tensor:
        """Normalised latents (B, *shape), from the noise of t = 1: each seed's own, or `start` where it is given."""
        begin = prior(denoise.schedule, shape, noise) if start is None else start.expand(len(noise), *shape)
        return sample(plan.sampler, denoise, begin, plan.grid(plan.steps, denoise.schedule), noise, watch=watch)

    def guided(self, captions: Captions, negatives: Sequence[str] | None = None, also: Also = (),
               plan: Sampling | None = None) -> Denoise:
        """What a sampler calls for these captions: the denoiser, its conditions and the plan's guidance closed over."""
        plan, captions = plan or self.sampling, _each(captions)
        cond, null = self.text(captions), self.text(negatives or [""])
        if also:
            weighed = [(self.text([caption]).expand(len(captions)), weight) for caption, weight in also]
            return beside(plan.guidance, self.denoiser, cond, weighed, null)
        return plan.guidance(self.denoiser, cond, null, Helpers(self.weak, self.judging(captions)))

    def judging(self, captions: Sequence[str]) -> Callable[[Tensor, Tensor, Cond], Tensor] | None:
        """log p(captions | x_t): a classifier of clean pictures reads the one that x_t points at (Bansal et al. 2023,
        arXiv 2302.07121); None where there is no judge."""
        if (judge := self.judge) is None:
            return None
        return lambda x, t, cond: judge(self.decode(self.denoiser(x, t, cond).x0), captions)

    @torch.no_grad()
    def invert(self, images: Tensor, captions: Captions, sampling: Sampling | None = None) -> Tensor:
        """The noise at t = 1 from which `ddim` draws pictures (B,3,H,W) in [-1, 1] again: DDIM inversion, unguided.

        It walks the grid of `sampling` upwards from the encoder's mean; the more steps, the nearer the way back.
        """
        plan = sampling or self.sampling
        denoise = self.denoiser.bind(self.text(_each(captions)))
        x0 = self.autoencoder.norm.mean_latents(self.encode(images))
        grid = plan.grid(plan.steps, self.denoiser.schedule).flip(0)
        return sample(DDIMInversion(), denoise, x0, grid, Noise.from_seeds([0] * len(x0), self.device))

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents -> images, in tiles where `tile` is set."""
        if not self.tile:
            return self.autoencoder.decode(latents)
        return decode_tiled(self.autoencoder, latents, tile=self.tile, overlap=self.tile // 4)

    def encode(self, images: Tensor) -> Tensor:
        """images -> moments, in tiles where `tile` is set."""
        if not self.tile:
            return self.autoencoder.encode(images)
        return encode_tiled(self.autoencoder, images, tile=self.tile, overlap=self.tile // 4)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of pictures of `size` pixels. Raises ValueError, in pixels, where the autoencoder's factor or the
        backbone does not divide them."""
        factor, multiple = self.autoencoder.factor, getattr(self.denoiser.backbone, "multiple", 1)
        step = factor * multiple
        for side in size:
            if side <= 0 or side % step:
                near = sorted({max(step, side // step * step), (max(side, 0) // step + 1) * step})
                by = f"{step}, which is {multiple} of the autoencoder's {factor} pixels" if multiple > 1 else (
                    f"the autoencoder's factor {factor}")
                said = f"size {size[1]}x{size[0]} is not divisible by {by}"
                raise ValueError(f"{said}: nearest {' or '.join(map(str, near))}.")
        return self.autoencoder.latent_channels, size[0] // factor, size[1] // factor


def _each(captions: Captions) -> Sequence[str]:
    """One string is one caption, not one for each letter."""
    return [captions] if isinstance(captions, str) else captions
