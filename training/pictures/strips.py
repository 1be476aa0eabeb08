"""A strip of pictures of one sampling: x_t at several times, and the estimate of x0 at each."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from autoencoder.images import to_uint8
from ldm.guidance import per_sample_std
from ldm.pipeline import Pipeline
from ldm.samplers import Snapshot
from training.pictures import grids


class Strip:
    """Watches a sampler of `steps` steps and keeps about `shown` of them, the last among them, decoded."""

    def __init__(self, pipeline: Pipeline, steps: int, shown: int = 8) -> None:
        self.pipeline = pipeline
        shown = min(shown, steps)
        self.wanted = {steps - 1 - i * steps // shown for i in range(shown)}
        self.noisy: list[Tensor] = []
        self.clean: list[Tensor] = []
        self.times: list[float] = []

    def __call__(self, shot: Snapshot) -> None:
        if shot.step not in self.wanted:
            return
        # Processes of growing variance are shown at the scale of the others.
        x = shot.x / per_sample_std(shot.x).clamp(min=1)
        for row, latents in ((self.noisy, x), (self.clean, shot.x0)):
            row.append(to_uint8(self.pipeline.decode(latents)).cpu())
        self.times.append(shot.t)

    def draw(self, index: int) -> Image.Image:
        """x_t above, the estimate of x0 below, from left to right as time falls, for one sample of the batch."""
        images = [image for row in (self.noisy, self.clean) for step in row for image in grids.to_pil(step[[index]])]
        captions = [f"t = {t:.3f}" for t in self.times] + [""] * len(self.times)
        return grids.grid(images, len(self.times), captions=captions, rows=("x_t", "x0"))
