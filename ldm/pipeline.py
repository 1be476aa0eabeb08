"""Captions and seeds in, pictures out: the one place where stage two meets the autoencoder's decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from autoencoder.base import Autoencoder, size_in_words
from autoencoder.identity import IdentityAutoencoder
from autoencoder.images import to_uint8
from autoencoder.tiles import decode_tiled, encode_tiled
from ldm.arguments import (
    NO_EXTRAS,
    Also,
    Captions,
    Extras,
    Seeds,
    Words,
    check_extras,
    check_hints,
    cut_extras,
    each_caption,
    each_seed,
    each_weight,
    joined_extras,
    one_each,
    translated,
)
from ldm.arguments import Sampling as Sampling  # which others look for here
from ldm.backbones.image import SIZE
from ldm.composition import beside
from ldm.conditioning import Cond
from ldm.coupling import Coupled, Coupling
from ldm.denoiser import Conditional, Denoise, Denoiser
from ldm.guiding import Helpers, Scaled
from ldm.image_conditions import ImageCondition, NoImage
from ldm.image_conditions.hint import Hint
from ldm.image_conditions.source import ImageGuided, Source
from ldm.jumps import Jumping
from ldm.noise import Noise
from ldm.samplers import sample
from ldm.students import NO_STUDENT, Student, check_held, check_negatives, check_plan, check_walk
from ldm.tasks import NO_TASK, Task, Tasks, Watch
from ldm.text import TextEncoder
from ldm.thresholding import Thresholded

NO_IMAGE = NoImage()


@dataclass(frozen=True, eq=False, repr=False)
class Pipeline:
    """A trained run, ready to draw: `pipeline("a red circle", seed=0)` gives PIL images.

    A picture depends on its caption, its seed and the settings alone, not on its batch: the noise is keyed by the seed,
    bit for bit. `size`: pixels (height, width). `weak`: the poorer model of autoguidance. `judge`, for classifier
    guidance: log p(caption | image) (B,) of images (B,3,H,W) in [-1, 1] and their captions. `tile`, 0 or at least 16:
    the side, in latents, of the overlapping tiles that the autoencoder works in, so that its memory is that of one
    tile; 0, the whole picture at once (`autoencoder.tiles` says where they are equal). `image`: what the denoiser was
    trained to be shown besides captions. `student`: what a few-step model was taught. `sizes`: those it was trained at
    besides `size`; `sized`: whether it is told the size that a picture is cut from, and where.
    Nothing of it changes: `dataclasses.replace(pipeline, tile=16)` is another.
    Raises ValueError where the schedule has no such grid of so many steps.
    """

    autoencoder: Autoencoder
    denoiser: Denoiser
    text: TextEncoder
    sampling: Sampling
    size: tuple[int, int]
    weak: Conditional | None = None
    judge: Callable[[Tensor, Sequence[str]], Tensor] | None = None
    tile: int = 0
    image: ImageCondition = NO_IMAGE
    student: Student = NO_STUDENT
    sizes: tuple[tuple[int, int], ...] = ()
    sized: bool = False

    def __post_init__(self) -> None:
        self._check(self.sampling)

    def _check(self, plan: Sampling) -> None:
        check_plan(self.student, plan, self.denoiser)
        plan.grid(plan.steps, self.denoiser.schedule)
        if plan.dynamic_threshold and not isinstance(self.autoencoder, IdentityAutoencoder):
            raise ValueError("dynamic_threshold scales pixels into their range, and these are latents, which have "
                             "none: leave it out, or train on the latents of the autoencoder identity.")
        if plan.image_scale != 1 and not isinstance(self.image, Source):
            raise ValueError("image_scale guides by a picture that is to be changed, and this model is shown none: "
                             "leave it out, or train with image.kind source.")
        if plan.cut and not self.sized:
            raise ValueError("original_size and crop_offset are told to a model, and this one reads none: leave them "
                             "out, or train with conditioning.size true.")

    @property
    def device(self) -> torch.device:
        """Where the decoder lives."""
        return self.autoencoder.norm.scale.device

    @property
    def multiple(self) -> int:
        """Pixels: what both sides of a picture are multiples of."""
        return self.autoencoder.factor * int(getattr(self.denoiser.backbone, "multiple", 1))

    @property
    def hints(self) -> set[str]:
        """The names of the extras that are read as hints."""
        own = {"image"} if isinstance(self.image, Hint) else set[str]()
        return own | {branch.hint for branch in getattr(self.denoiser.backbone, "branches", ())}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(\n  " + ",\n  ".join(self._facts()) + "\n)"

    def _facts(self) -> Iterator[str]:
        plan, guidance = self.sampling, self.sampling.guidance
        scale = f", scale {guidance.scale:g}" if isinstance(guidance, Scaled) else ""
        yield from map(repr, (self.denoiser, self.autoencoder))
        yield f"text encoder {type(self.text).__name__}: {size_in_words(self.text)}"
        latents = "x".join(map(str, self.latent_shape(self.size)))
        yield f"pictures of {_size(self.size)} pixels (height x width) from latents of {latents}"
        if isinstance(self.denoiser, Jumping):
            yield f"a few-step model, {self.student.words}"
        yield f"{plan.steps} steps of {plan.sampler.kind} on the grid {plan.grid.kind}, guidance {guidance.kind}{scale}"

    def __call__(self, captions: Captions | None = None, seeds: Seeds | None = None,
                 **words: Unpack[Words]) -> list[Any]:
        """One PIL image per caption, grey, RGB or RGBA by the autoencoder's channels.

        `seeds`: one each, or the first of a run; `words`: the settings of `pixels`, or what other programs call them
        (prompt, negative_prompt, num_images_per_prompt, num_inference_steps, guidance_scale, height and width, seed):
        `ldm.arguments.translated` says what each means, and what it raises.
        """
        from PIL import Image

        each, numbers, settings = translated(captions, seeds, words, self.sampling)
        parts = list(self.pixels(each, numbers, **settings))
        if not parts:
            return []
        pixels = torch.cat(parts)
        grey = pixels.shape[1] == 1
        return [Image.fromarray(p[..., 0] if grey else p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    def pixels(self, captions: Captions, seeds: Seeds = 0, *, negative: Captions = "", also: Also = (),
               extras: Extras = NO_EXTRAS, task: Tasks | None = None, sampling: Sampling | None = None,
               size: tuple[int, int] | None = None, batch_size: int = 64,
               watch: Watch | None = None) -> Iterator[Tensor]:
        """uint8 (b,C,H,W) batch by batch, in the order of the captions, so that any number of pictures streams.

        `captions`: one string is one picture; `negative`: what guidance moves away from (one, or one per caption);
        `also`: further captions for every picture, each with its weight (`ldm.composition`); `extras`: what
        `Cond.extras` is to hold by name, (1 or N, ...), a hint (N, C, height, width) in [0, 1]: it stays with the
        picture, its null and its reference alike; `task`: of `ldm.image_tasks`, to edit or to restore; `size`: pixels
        (height, width). Raises ValueError, before anything is drawn, for a size that does not fit, where what is given
        per caption is more or fewer than the captions, and for hints outside of [0, 1].
        """
        captions, negatives = each_caption(captions), each_caption(negative)
        seeds = each_seed(seeds, len(captions))
        negatives = negatives * len(captions) if isinstance(negative, str) else negatives
        for given, name in ((seeds, "seeds"), (negatives, "negative prompts")):
            if len(given) != len(captions):
                raise ValueError(f"{len(captions)} captions but {len(given)} {name}: give one, or one each.")
        also = each_weight(also)
        check_extras(extras, len(captions))
        check_hints(extras, self.hints)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        shape, plan = self.latent_shape(size or self.size), sampling or self.sampling
        self._check(plan)
        check_negatives(self.student, plan, self.denoiser, negatives, bool(also))
        if refuse := getattr(self.text, "check", None):
            refuse([*captions, *negatives, *(caption for caption, _ in also)])
        if not task:  # which may have a shape of its own
            self.cut(extras, slice(1), shape)

        @torch.no_grad()
        def drawn() -> Iterator[Tensor]:
            for first in range(0, len(captions), batch_size):
                part = slice(first, first + batch_size)
                own = task(part) if task else NO_TASK
                texts, others, noise = captions[part], negatives[part], Noise.from_seeds(seeds[part], self.device)
                seen = self.cut(extras, part, own.shape or shape, len(texts))
                seen = joined_extras(seen, {} if own.extras is None else own.extras(noise))
                if beside := own.reference:
                    pairs = zip(one_each(beside.captions, len(texts)), texts, strict=True)
                    texts = [text for pair in pairs for text in pair]
                    others, noise = [text for text in others for _ in range(2)], Noise(noise.seeds.repeat_interleave(2))
                    seen = {name: each.repeat_interleave(len(texts) // len(each), 0) for name, each in seen.items()}
                denoise = self.guided(texts, others, also, plan, beside.coupling if beside else None, seen)
                watched = _without_references(watch) if watch and beside else watch
                latents = self.latents(denoise, noise, own.shape or shape, plan, own, watched)
                yield own.finish(to_uint8(self.decode(latents[1::2] if beside else latents)))

        return drawn()

    def latents(self, denoise: Denoise, noise: Noise, shape: tuple[int, ...], plan: Sampling, task: Task = NO_TASK,
                watch: Watch | None = None) -> Tensor:
        """Normalised latents (B, *shape), from the noise of t = 1: each seed's own; or as the task has it."""
        schedule, denoise = denoise.schedule, task.hold(denoise)
        grid = plan.grid(plan.steps, schedule)
        if task.draw:
            return task.draw(denoise, grid, noise, watch)
        times = task.visits(grid, schedule)
        check_held(self.denoiser, plan.sampler, denoise)
        check_walk(self.denoiser, task, times, grid)
        x = task.begin(schedule, grid, times, shape, noise)
        return x if len(times) < 2 else sample(plan.sampler, denoise, x, times, noise, watch)

    def guided(self, captions: Captions, negatives: Sequence[str] | None = None, also: Also = (),
               plan: Sampling | None = None, coupling: Coupling | None = None,
               extras: Extras = NO_EXTRAS) -> Denoise:
        """What a sampler calls for these captions: the denoiser, its conditions and the plan's guidance closed over;
        under a `coupling` they are pairs, each caption after that of its reference. `extras` (1 or B, ...) stand beside
        every condition, further captions and null included: guidance removes the words alone."""
        plan, captions = plan or self.sampling, each_caption(captions)
        self._check(plan)
        if plan.cut and SIZE not in extras:
            extras = {**extras, SIZE: torch.tensor([plan.cut], dtype=torch.float32, device=self.device)}
        denoiser: Conditional = Coupled(coupling, self.denoiser) if coupling else self.denoiser
        if plan.image_scale != 1:
            denoiser = ImageGuided(denoiser, self.text([""]), plan.image_scale)
        cond, null = self.told(captions, extras), self.text(negatives or [""])
        if also:
            weighed = [(self.told([caption] * len(captions), extras), weight) for caption, weight in also]
            guided = beside(plan.guidance, denoiser, cond, weighed, null)
        else:
            guided = plan.guidance(denoiser, cond, null, Helpers(self.weak, self.judging(captions)))
        return Thresholded(guided, plan.dynamic_threshold) if plan.dynamic_threshold else guided

    def told(self, captions: Sequence[str], extras: Extras = NO_EXTRAS) -> Cond:
        """The condition of captions, with what stands beside them (1 or B, ...)."""
        cond: Cond = self.text(captions)
        each = {name: extra.expand(len(captions), *extra.shape[1:]) for name, extra in extras.items()}
        return cond._replace(extras={**cond.extras, **each}) if extras else cond

    def cut(self, extras: Extras, part: slice, shape: tuple[int, ...], count: int = 1) -> dict[str, Tensor]:
        """The extras of `count` pictures from latents of `shape`, those at a slice of all; raises as `pixels` does."""
        latents = (shape[1], shape[2])
        pixels = (latents[0] * self.autoencoder.factor, latents[1] * self.autoencoder.factor)
        return self.image.fitted(cut_extras(extras, part, count, (pixels, latents), self.device), latents)

    def judging(self, captions: Sequence[str]) -> Callable[[Tensor, Tensor, Cond], Tensor] | None:
        """log p(captions | x_t): a classifier of clean pictures reads the one that x_t points at (Bansal et al. 2023,
        arXiv 2302.07121); None where there is no judge."""
        if (judge := self.judge) is None:
            return None
        return lambda x, t, cond: judge(self.decode(self.denoiser(x, t, cond).x0), captions)

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
        backbone does not divide them: with the sizes next below and above that work."""
        if isinstance(size, int) or len(size) != 2:
            raise ValueError(f"size must be (height, width) in pixels, got {size}.")
        factor, step = self.autoencoder.factor, self.multiple
        multiple = step // factor
        if any(side <= 0 or side % step for side in size):
            near = [_size(max(step, (max(side, 0) + up) // step * step) for side in size) for up in (0, step - 1)]
            by = f"{step}, which is {multiple} of the autoencoder's {factor} pixels" if multiple > 1 else (
                f"the autoencoder's factor {factor}")
            nearest = " or ".join(dict.fromkeys(near))
            raise ValueError(f"size {_size(size)} (height x width) is not divisible by {by}: nearest {nearest}.")
        return self.autoencoder.latent_channels, size[0] // factor, size[1] // factor


def _size(size: Iterable[int]) -> str:
    """`HEIGHTxWIDTH`, one number where they are the same."""
    height, width = size
    return f"{height}x{width}" if height != width else str(height)


def _without_references(watch: Watch) -> Watch:
    """Of the pairs of a reference and a picture, the pictures."""
    return lambda shot: watch(shot._replace(x=shot.x[1::2], x0=shot.x0[1::2]))
