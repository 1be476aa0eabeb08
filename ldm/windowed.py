"""A backbone in windows over a canvas larger than it was trained on, its pictures cut as the latents are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ldm.conditioning import Cond
from ldm.editing import averaged, windows_of

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline


class InWindows(nn.Module):
    """sum_i w_i y_i / sum_i w_i of a backbone's answers y_i in windows of `size` = (h, w) latents, `stride` apart.

    Both ends of x_t are linear in y, so that they are averaged as `ldm.editing.Windows` does; but here, beneath
    guidance, each window is shown its own part of the extras that are pictures (B, C, f h, f w), whatever f. Where one
    window covers the canvas the backbone is called as it is. Raises ValueError for a picture of no whole f.
    """

    def __init__(self, backbone: nn.Module, size: tuple[int, int], stride: int) -> None:
        super().__init__()
        if not 1 <= stride <= min(size):
            raise ValueError(f"windows of {size} need a stride from 1 to {min(size)}, got {stride}")
        self.backbone, self.size, self.stride = backbone, size, stride
        self.multiple = int(getattr(backbone, "multiple", 1))

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x (B, C, h, w), noise_level (B,) -> what the backbone answers, (B, C, h, w)."""
        windows = windows_of(x, self.size, self.stride)
        if len(windows) == 1:
            whole: Tensor = self.backbone(x, noise_level, cond)
            return whole
        scales = {name: _scale(name, extra, x) for name, extra in cond.extras.items() if extra.ndim == 4}

        def call(rows: slice, columns: slice) -> dict[str, Tensor]:
            own = {name: cond.extras[name][..., _times(rows, f), _times(columns, f)] for name, f in scales.items()}
            told = cond._replace(extras={**cond.extras, **own})
            return {"y": self.backbone(x[..., rows, columns], noise_level, told)}

        return averaged(windows, x, call)["y"]


def _scale(name: str, extra: Tensor, x: Tensor) -> int:
    large, small = tuple(extra.shape[-2:]), tuple(x.shape[-2:])
    factor = large[0] // small[0]
    if factor < 1 or large != (factor * small[0], factor * small[1]):
        given, wanted = ("x".join(map(str, sides)) for sides in (large, small))
        raise ValueError(f"the extra {name!r} of {given} cannot be cut with latents of {wanted}: its sides must be the "
                         "same multiple of theirs")
    return factor


def _times(span: slice, factor: int) -> slice:
    return slice(span.start * factor, span.stop * factor)


def in_windows(pipeline: Pipeline, stride: int) -> Pipeline:
    """The pipeline, its backbone in windows of the trained size, `stride` latents apart; 0 for none."""
    if not stride:
        return pipeline
    _, height, width = pipeline.latent_shape(pipeline.size)
    backbone: nn.Module = pipeline.denoiser.backbone  # type: ignore[assignment]  # one with weights
    return replace(pipeline, denoiser=replace(pipeline.denoiser, backbone=InWindows(backbone, (height, width), stride)))
