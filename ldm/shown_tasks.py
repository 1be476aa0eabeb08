"""Tasks for models that are shown pictures: `pipeline("make it red", task=instructed(pipeline, [it]))`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from autoencoder.images import to_unit
from ldm.image_tasks import Pictures, as_pixels, encoded, padded
from ldm.pipeline import Pipeline
from ldm.tasks import Task, Tasks


def instructed(pipeline: Pipeline, pictures: Pictures, *, strength: float = 1.0,
               start_time: float | None = None) -> Tasks:
    """The pictures, changed as the captions say, by a model that is shown them (`image_conditions.source`).

    A `strength` below 1, or a `start_time`, also begins from them, as `image_tasks.image_to_image` does.
    """
    whole, plain = _canvas(pipeline, as_pixels(pipeline, pictures))
    plain = replace(plain, strength=strength, start_time=start_time)

    def task(part: slice) -> Task:
        latents = encoded(pipeline, to_unit(_of(whole, part)))
        begun = strength < 1 or start_time is not None
        return replace(plain, source=latents if begun else None, extras=lambda noise: {"image": latents})

    return task


def _canvas(pipeline: Pipeline, pixels: Tensor) -> tuple[Tensor, Task]:
    """Pixels on a canvas that the model draws, and a task that cuts what is drawn back to theirs."""
    height, width = pixels.shape[-2:]
    whole = padded(pixels, pipeline.multiple).to(pipeline.device)
    shape = pipeline.latent_shape((whole.shape[-2], whole.shape[-1]))
    return whole, Task(shape=shape, finish=lambda made: made[..., :height, :width])


def _of(given: Tensor, part: slice) -> Tensor:
    return given if len(given) == 1 else given[part]
