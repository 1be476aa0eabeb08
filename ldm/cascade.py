"""Cascades: a model that draws small pictures, and others that make them larger, one after the other.

Ho et al. 2021 (arXiv 2106.15282), Saharia et al. 2022 (arXiv 2205.11487): every stage reads the caption, and what it is
shown is the picture of the stage before, with noise added, of which it is told how much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.arguments import Captions, each_caption, each_seed, one_each
from ldm.noise import Noise
from ldm.pipeline import Pipeline
from ldm.tasks import Tasks
from ldm.upscaling import level_of, low_res_of, upscaling


@dataclass(frozen=True, eq=False)
class Stage:
    """A pipeline, and the level at which it is shown the picture before; None, its condition's own."""

    pipeline: Pipeline
    level: float | None = None


@dataclass(frozen=True, eq=False)
class Cascade:
    """`stages`, the first of which draws from captions alone. Raises ValueError, with what would fit, where a stage
    cannot follow the one before it."""

    stages: Sequence[Stage]

    def __post_init__(self) -> None:
        if len(self.stages) < 2:
            raise ValueError(f"a cascade has at least 2 stages, got {len(self.stages)}")
        if (kind := self.stages[0].pipeline.image.kind) != "none":
            raise ValueError("the first stage of a cascade draws from captions alone, and this one is shown an image "
                             f"of kind {kind}: begin with one that is not")
        for number, (before, after) in enumerate(pairwise(self.stages), 2):
            _check(number, before.pipeline, after.pipeline)
            level_of(after.pipeline, after.level)

    def pixels(self, captions: Captions, seeds: int | Sequence[int] = 0, *, negative: str = "",
               batch_size: int = 64) -> Iterator[list[Tensor]]:
        """The pictures of every stage, uint8 (b, C, H, W), batch by batch; stage k has `stage_seeds`."""
        texts = each_caption(captions)
        numbers = each_seed(seeds, len(texts))
        for first in range(0, len(texts), batch_size):
            part = slice(first, first + batch_size)
            made = [self._small(1, texts[part], numbers[part], negative)]
            for count in range(1, len(self.stages)):
                made.append(self._drawn(count, made[-1], texts[part], numbers[part], negative))
            yield made

    def before_last(self, captions: Sequence[str], seeds: Sequence[int], negative: str = "") -> Tensor:
        """The pictures that the last stage is shown, uint8 (B, C, h, w)."""
        return self._small(len(self.stages) - 1, captions, seeds, negative)

    def last(self, small: Tensor) -> Tasks:
        """The task of the last stage for these pictures."""
        return self._task(len(self.stages) - 1, small)

    def _small(self, count: int, captions: Sequence[str], seeds: Sequence[int], negative: str) -> Tensor:
        """What the first `count` stages make."""
        made: Tensor | None = None
        for number in range(count):
            made = self._drawn(number, made, captions, seeds, negative)
        assert made is not None
        return made

    def _drawn(self, number: int, small: Tensor | None, captions: Sequence[str], seeds: Sequence[int],
               negative: str) -> Tensor:
        own, task = stage_seeds(seeds, number), None if small is None else self._task(number, small)
        drawn = self.stages[number].pipeline.pixels(one_each(captions, len(own)), own, negative=negative, task=task,
                                                    batch_size=len(own))
        return torch.cat(list(drawn))

    def _task(self, number: int, small: Tensor) -> Tasks:
        stage = self.stages[number]
        return upscaling(stage.pipeline, small.to(stage.pipeline.device), level=stage.level)


def stage_seeds(seeds: Sequence[int], number: int) -> list[int]:
    """The seeds of stage `number`: those of the first stage as they are, so that it draws what it draws alone, others
    folded, so that no two stages begin from the same noise."""
    return list(seeds) if number == 0 else Noise.from_seeds(seeds).fold("cascade", number).seeds.tolist()


def _check(number: int, before: Pipeline, after: Pipeline) -> None:
    """Raises ValueError where the pictures of `before` are not what `after` was trained to enlarge."""
    factor, (height, width) = low_res_of(after).factor, after.size
    wanted, got = (height // factor, width // factor), before.size
    if wanted != got:
        enlarged = _words((got[0] * factor, got[1] * factor))
        raise ValueError(f"stage {number} of the cascade makes {_words((height, width))} pixels of {_words(wanted)}, "
                         f"and the stage before it draws {_words(got)}: give one that draws {_words(wanted)}, or an "
                         f"upscaler to {enlarged}")
    channels = [pipeline.autoencoder.image_channels for pipeline in (before, after)]
    if channels[0] != channels[1]:
        raise ValueError(f"stage {number} of the cascade enlarges pictures of {channels[1]} channels, and the stage "
                         f"before it draws {channels[0]}: give stages of the same channels")


def _words(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
