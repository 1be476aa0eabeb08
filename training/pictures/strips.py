"""A strip of pictures of one sampling: x_t at several times, and the estimate of x0 at each."""

from __future__ import annotations

from functools import cached_property

from PIL import Image
from torch import Tensor

from autoencoder.images import to_uint8
from ldm.guidance import per_sample_std
from ldm.pipeline import Pipeline
from ldm.samplers import Snapshot
from training.pictures import grids

MOST = 64  # steps that are kept: of more, every second, every fourth ... and the last


class Strip:
    """Watches a sampling, of however many steps, and shows about `shown` of them, the last among them, decoded."""

    def __init__(self, pipeline: Pipeline, shown: int = 8) -> None:
        self.pipeline, self.shown = pipeline, shown
        self.shots: list[Snapshot] = []
        self.every = 1

    def __call__(self, shot: Snapshot) -> None:
        if self.shots and (self.shots[-1].step + 1) % self.every:  # the last one so far stood for none that is kept
            self.shots.pop()
        if len(self.shots) == MOST:
            self.every *= 2
            self.shots = [kept for kept in self.shots if (kept.step + 1) % self.every == 0]
        self.shots.append(shot)

    @cached_property
    def rows(self) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """x_t and x0 of the steps shown, uint8 of the whole batch, and their times."""
        count = len(self.shots)
        shown = min(self.shown, count)
        chosen = [self.shots[place] for place in sorted({count - 1 - i * count // shown for i in range(shown)})]
        # Processes of growing variance are shown at the scale of the others.
        noisy = [self._decoded(shot.x / per_sample_std(shot.x).clamp(min=1)) for shot in chosen]
        return noisy, [self._decoded(shot.x0) for shot in chosen], [shot.t for shot in chosen]

    def _decoded(self, latents: Tensor) -> Tensor:
        return to_uint8(self.pipeline.decode(latents)).cpu()

    def draw(self, index: int) -> Image.Image:
        """x_t above, the estimate of x0 below, from left to right as time falls, for one sample of the batch."""
        noisy, clean, times = self.rows
        images = [image for row in (noisy, clean) for step in row for image in grids.to_pil(step[[index]])]
        captions = [f"t = {t:.3f}" for t in times] + [""] * len(times)
        return grids.grid(images, len(times), captions=captions, rows=("x_t", "x0"))
