"""What to do with pictures and a trained model, without training: tasks for `Pipeline.pixels`.

    pipeline("a red circle", task=image_to_image(pipeline, [picture], strength=0.6))
    pipeline("a blue square", task=inpainting(pipeline, [picture], mask))

Pictures are PIL images or uint8 (1 or B, C, H, W), all of one size: one for all captions, or one each. They keep that
size: where the model's multiple does not divide it, their last row and column are repeated, and cut off again at the
end. `windows`: latents from one window of the trained size to the next, for larger pictures; 0 draws them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from autoencoder.identity import IdentityAutoencoder
from autoencoder.images import to_unit
from ldm.arguments import NO_EXTRAS, Captions, Extras, Sampling, each_caption, one_each
from ldm.coupling import Coupling, Style
from ldm.denoiser import Denoise
from ldm.editing import Known, Windows, adain, composite, filled, hole_in_latents
from ldm.guidance import Embedded, told_scale
from ldm.image_conditions.masked import Masked
from ldm.inverse.measurement import Measurement
from ldm.inverse.operators import Decoded, GivenMask, Operator
from ldm.inverse.posterior import Posterior
from ldm.inversion import edit_friendly
from ldm.noise import Noise
from ldm.pipeline import Pipeline
from ldm.samplers import DDIMInversion, sample
from ldm.students import check_denoises
from ldm.tasks import Reference, Task, Tasks, Watch, unheld

Pictures = Tensor | Sequence[Any]
Method = Measurement | Posterior
Given = TypeVar("Given", Tensor, Sequence[str])
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def image_to_image(pipeline: Pipeline, pictures: Pictures, *, strength: float = 0.8, start_time: float | None = None,
                   windows: int = 0) -> Tasks:
    """The pictures, noised and drawn again: SDEdit. Meng et al. 2021 (arXiv 2108.01073), algorithm 1.

    `strength`: the share of the sampler's steps that is walked; 1 is a drawing from noise alone, 0 the reconstruction.
    `start_time`: the time t to begin at instead.
    """
    source = as_pixels(pipeline, pictures)
    whole = padded(source, pipeline.multiple)
    plain = Task(shape=_shape(pipeline, whole), strength=strength, start_time=start_time,
                 hold=windowed(pipeline, windows), finish=lambda made: _cropped(made, source))
    return lambda part: replace(plain, source=encoded(pipeline, to_unit(_of(whole, part))))


def inpainting(pipeline: Pipeline, pictures: Pictures, mask: Tensor, *, strength: float = 1.0,
               start_time: float | None = None, feather: int = 0, fill: Literal["grey", "nearest"] = "nearest",
               dilate: int = 1, windows: int = 0, posterior: Posterior | None = None) -> Tasks:
    """The hole of each picture drawn anew: `mask` (1 or B, 1, H, W) is True there.

    Pixels farther than `feather` from the hole are those of the source, bit for bit. The hole is filled before the
    picture is encoded, so that nothing of what was there is seen; `dilate` more latents around it are drawn too. A
    `strength` below 1 begins from the picture as it was, hole included. A model that was trained with masks is shown
    hole and known latents; others are held to them. `posterior`: a draw of the latents that are
    seen with one mask for all, without noise, in place of the sampler: RePaint. Raises ValueError for a mask of another
    size, and for a posterior with several masks or a part of the walk.
    """
    source = as_pixels(pipeline, pictures)
    if posterior:
        check_denoises(pipeline.denoiser, posterior.kind)
    if mask.shape[-2:] != source.shape[-2:]:
        raise ValueError(f"the mask is {_words(mask)} pixels and the picture {_words(source)}: give one of its size")
    if posterior and (len(mask) > 1 or strength != 1 or start_time is not None):
        raise ValueError(f"{posterior.kind} draws the holes of one mask, and walks from noise alone: give one mask for "
                         "all pictures, and neither strength nor start time")
    whole, hole = (padded(part, pipeline.multiple) for part in (source, mask))
    free, inner = hole_in_latents(hole, pipeline.autoencoder.factor, dilate), windowed(pipeline, windows)
    plain = Task(shape=_shape(pipeline, whole), strength=strength, start_time=start_time)
    operator = GivenMask(~free[0, 0]) if posterior else None
    partly, trained = strength < 1 or start_time is not None, pipeline.image
    if isinstance(trained, Masked) and windows:
        raise ValueError("a model that is shown the whole canvas draws no windows of it: leave them out")

    def task(part: slice) -> Task:
        images, gap = to_unit(_of(whole, part)), _of(free, part)
        known = encoded(pipeline, filled(images, _of(hole, part), fill))

        def finish(made: Tensor) -> Tensor:
            return composite(_cropped(made, source), _of(source, part), _of(mask, part), feather)

        def draw(denoise: Denoise, grid: Tensor, noise: Noise, watch: Watch | None) -> Tensor:
            assert posterior and operator
            y = operator(known).expand(len(noise), *known.shape[1:])
            return posterior.draw(denoise, operator, y, 0.0, grid, noise, watch)

        shown = trained.shown(known, gap) if isinstance(trained, Masked) else None
        own = replace(plain, finish=finish, hold=inner, extras=None if shown is None else lambda noise: shown)
        if posterior:
            return replace(own, draw=draw)
        own = replace(own, source=encoded(pipeline, images) if partly else None)
        return own if shown else replace(own, hold=lambda denoise: Known(inner(denoise), gap, known))

    return task


def extended(pipeline: Pipeline, pictures: Pictures, margins: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """A canvas larger by `margins` pixels (left, top, right, bottom), and the mask of what is new: for `inpainting`,
    which then is outpainting. Raises ValueError for margins below 0 or without any."""
    source, (left, top, right, bottom) = as_pixels(pipeline, pictures), margins
    if min(margins) < 0 or not any(margins):
        raise ValueError(f"margins are left, top, right and bottom pixels, at least one above 0, got {margins}")
    canvas = torch.nn.functional.pad(source, (left, right, top, bottom))
    new = torch.ones_like(canvas[:1, :1], dtype=torch.bool)
    new[..., top : top + source.shape[-2], left : left + source.shape[-1]] = False
    return canvas, new


@torch.no_grad()
def inverted(pipeline: Pipeline, images: Tensor, captions: Captions, sampling: Sampling | None = None,
             iterations: int = 1, extras: Extras = NO_EXTRAS) -> Tensor:
    """The noise at t = 1 from which `ddim` draws images (B, C, H, W) in [-1, 1] again: DDIM inversion, unguided.

    It walks the grid of `sampling` upwards from the encoder's mean; the more steps, and the more fixed-point
    `iterations` in each, the nearer the way back. Drawn with guidance, or other `extras`, it leads elsewhere; the
    guidance of a student is in its network, and on the way up as well. Raises ValueError for a student that is no
    denoiser.
    """
    plan = sampling or pipeline.sampling
    check_denoises(pipeline.denoiser, "inversion")
    pipeline.latent_shape((images.shape[-2], images.shape[-1]))
    texts = each_caption(captions)
    x0, grid = encoded(pipeline, images), plan.grid(plan.steps, pipeline.denoiser.schedule).flip(0)
    told = pipeline.told(texts, pipeline.cut(extras, slice(None), x0.shape[1:], len(x0)))
    told = told_scale(told, plan.guidance.scale) if isinstance(plan.guidance, Embedded) else told
    walk, denoise = DDIMInversion(iterations=iterations), pipeline.denoiser.bind(told)
    return sample(walk, denoise, x0, grid, Noise.from_seeds([0] * len(x0), x0.device))


def edit_friendly_inversion(pipeline: Pipeline, pictures: Pictures, captions: Captions, *, strength: float = 0.64,
                            sampling: Sampling | None = None, extras: Extras = NO_EXTRAS) -> Tasks:
    """The pictures as walks of an ancestral sampler under the `captions` that they show: under the same captions they
    are drawn again, at any guidance scale, under others they are edited.

    `strength`: the share of the steps that is walked; 0.64 is the paper's T_skip of 36 in 100. `sampling`: that of the
    drawing. Huberman-Spiegelglas et al. 2023 (arXiv 2304.06140).
    """
    source, plan = as_pixels(pipeline, pictures), sampling or pipeline.sampling
    check_denoises(pipeline.denoiser, "inversion")
    whole, texts = padded(source, pipeline.multiple), each_caption(captions)
    plain = Task(shape=_shape(pipeline, whole), strength=strength, finish=lambda made: _cropped(made, source))

    def task(part: slice) -> Task:
        latents, own = encoded(pipeline, to_unit(_of(whole, part))), _of(texts, part)

        def draw(denoise: Denoise, grid: Tensor, noise: Noise, watch: Watch | None) -> Tensor:
            times, x0 = plain.visits(grid, denoise.schedule), latents.expand(len(noise), *latents.shape[1:])
            if len(times) < 2:
                return x0
            seen = pipeline.cut(extras, part, x0.shape[1:], len(noise))
            told = pipeline.guided(one_each(own, len(noise)), plan=plan, extras=seen)
            return edit_friendly(plan.sampler, told, x0, times, noise).walk(denoise, watch)

        return replace(plain, draw=draw)

    return task


def styled(pipeline: Pipeline, style: Tensor, caption: str = "", coupling: Coupling = Style(),  # noqa: B008
           content: Tensor | None = None) -> Tasks:
    """In the colours and textures of a style picture, of which `style` (1, C, h, w) is the noise that `inverted` finds
    under its `caption`: AdaIN at the start, its keys and values in self-attention after it.

    `content`: the inverted noise of a picture to be drawn in that style; None, each seed's own.
    Chung et al. 2024 (arXiv 2312.09008).
    """
    def start(x: Tensor) -> Tensor:
        own = x[1::2] if content is None else content.expand(len(x) // 2, *x.shape[1:])
        return torch.stack([style.expand_as(own), adain(own, style)], dim=1).flatten(0, 1)

    held = Task(start=start, reference=Reference(coupling, [caption]))
    return lambda part: held


def referring(task: Tasks | None, coupling: Coupling, captions: Sequence[str]) -> Tasks:
    """A task, or a drawing from noise, whose pictures share the attention of those of `captions`, one or one each:
    prompt-to-prompt and MasaCtrl. Raises ValueError, when it is drawn, for a task that holds pictures to a mask."""
    def of(part: slice) -> Task:
        own = task(part) if task else Task()
        if own.hold is not unheld or own.draw:
            raise ValueError(f"{coupling.kind} draws pairs, which a mask, windows or a measurement cannot hold: leave "
                             "either out")
        return replace(own, reference=Reference(coupling, _of(captions, part)))

    return of


def restoration(pipeline: Pipeline, operator: Operator, y: Tensor, sigma_y: float, method: Method, *,
                windows: int = 0) -> Tasks:
    """Pictures x of which y = A x + sigma_y n was measured, y (1 or B, ...) for x in [-1, 1]: posterior samples.

    `method` is a member of `MEASUREMENTS`, with any sampler, or of `POSTERIORS`, which takes the sampler's place.
    Raises ValueError where the picture that y is of does not fit the model, and for what the method cannot do.
    """
    check_denoises(pipeline.denoiser, method.kind)
    channels, height, width = operator.domain(y)
    shape = pipeline.latent_shape((height, width))
    if channels != pipeline.autoencoder.image_channels:
        raise ValueError(f"the measurement is of pictures of {channels} channels, the model draws "
                         f"{pipeline.autoencoder.image_channels}: give one of those")
    pixels = isinstance(pipeline.autoencoder, IdentityAutoencoder)  # then latents are the picture, and A stays linear
    measured = operator if pixels else Decoded(operator, pipeline.decode, shape, partial(encoded, pipeline))
    inner = windowed(pipeline, windows)
    if refused := method.refusal(measured, sigma_y):
        raise ValueError(f"{method.kind} {refused}")

    def task(part: slice) -> Task:
        own = _of(y, part)
        if isinstance(method, Measurement):
            return Task(shape=shape, hold=lambda denoise: method(inner(denoise), measured, own, sigma_y))

        def draw(denoise: Denoise, grid: Tensor, noise: Noise, watch: Watch | None) -> Tensor:
            return method.draw(denoise, measured, own.expand(len(noise), *own.shape[1:]), sigma_y, grid, noise, watch)

        return Task(shape=shape, hold=inner, draw=draw)

    return task


def windowed(pipeline: Pipeline, stride: int) -> Callable[[Denoise], Denoise]:
    """A wrapper that draws in windows of the trained size, `stride` latents apart; 0 for none."""
    if not stride:
        return unheld
    _, height, width = pipeline.latent_shape(pipeline.size)
    return lambda denoise: Windows(denoise, (height, width), stride)


def encoded(pipeline: Pipeline, images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> the normalised latents of the posterior's mean."""
    return pipeline.autoencoder.norm.mean_latents(pipeline.encode(images))


def as_pixels(pipeline: Pipeline, pictures: Pictures) -> Tensor:
    """uint8 (1 or B, C, H, W) where the model is. Raises ValueError for other channels than the model's, pictures of
    several sizes, and none."""
    channels = pipeline.autoencoder.image_channels
    if not isinstance(pictures, Tensor):
        pictures = stacked(pictures, channels)
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != channels:
        raise ValueError(f"pictures must be uint8 (B, {channels}, H, W), got {pictures.dtype} of shape "
                         f"{tuple(pictures.shape)}")
    return pictures.to(pipeline.device)


def stacked(pictures: Sequence[Any], channels: int) -> Tensor:
    """PIL images as uint8 (B, channels, H, W). Raises ValueError where they are of several sizes, and for none."""
    if len(sizes := {picture.size for picture in pictures}) != 1:
        raise ValueError(f"the pictures of one task must be of one size, got {sorted(sizes) or 'none'}")
    ((width, height),) = sizes
    rows = [bytearray(picture.convert(MODES[channels]).tobytes()) for picture in pictures]
    pixels = torch.stack([torch.frombuffer(row, dtype=torch.uint8) for row in rows])
    return pixels.view(-1, height, width, channels).permute(0, 3, 1, 2)


def padded(pixels: Tensor, multiple: int) -> Tensor:
    """With the last row and column repeated until `multiple` divides both sides."""
    rows, columns = (torch.arange(-(-side // multiple) * multiple).clamp(max=side - 1) for side in pixels.shape[-2:])
    return pixels[..., rows, :][..., columns]


def _cropped(made: Tensor, source: Tensor) -> Tensor:
    return made[..., : source.shape[-2], : source.shape[-1]]


def _shape(pipeline: Pipeline, pixels: Tensor) -> tuple[int, int, int]:
    return pipeline.latent_shape((pixels.shape[-2], pixels.shape[-1]))


def _of(given: Given, part: slice) -> Given:
    """The pictures at a slice of those asked for, where not one stands for all."""
    return given if len(given) == 1 else given[part]


def _words(pixels: Tensor) -> str:
    return f"{pixels.shape[-2]}x{pixels.shape[-1]}"
