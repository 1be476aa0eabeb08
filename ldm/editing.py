"""Editing a picture: latents that stay, windows over a larger canvas, and masks between pixels and latents.

`Known` and `Windows` wrap a denoiser whose condition is closed over, and are one: every sampler walks with them
unchanged. A mask is bool, (B or 1, 1, H, W), True in the hole: what is to be made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from ldm.denoiser import Denoise
from ldm.diffusion import Denoised, with_x0
from ldm.jumps import jumping
from ldm.schedules import NoiseSchedule


@dataclass(frozen=True)
class Known(Denoise):
    """Inpainting by replacement: x0 is `latents` outside the hole, and the pair is completed for the same x_t.

    `hole` is (B or 1, 1, h, w) and bool, `latents` (B or 1, C, h, w). A hole everywhere changes nothing. Song et al.
    2021 (arXiv 2011.13456), appendix I.2, in x0 instead of x_t. Of a jump too: outside the hole x goes straight to the
    latents.
    """

    denoise: Denoise
    hole: Tensor
    latents: Tensor

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoise.schedule

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        return self._held(self.denoise(x, t), t)

    def jump(self, x: Tensor, t: Tensor, s: Tensor) -> Denoised:
        """See `ldm.jumps.Jump`."""
        return self._held(jumping(self.denoise).jump(x, t, s), t)

    def _held(self, ends: Denoised, t: Tensor) -> Denoised:
        return with_x0(ends, torch.where(self.hole, ends.x0, self.latents), self.schedule(t))


@dataclass(frozen=True)
class Windows(Denoise):
    """A canvas larger than the trained size: sum_i w_i ends_i / sum_i w_i over windows of `size` = (h, w) latents.

    Windows start every `stride` latents, the last at the border; a side that is no longer than a window's is one
    window. The weight of a window falls linearly from its middle to its edges, so that no edge shows. Each window is
    one call of the whole batch, under the condition of the whole canvas; `Known` stands around it, not within.
    Bar-Tal et al. 2023 (arXiv 2302.08113). Raises ValueError unless the stride is at least 1 and at most
    a window's shorter side.
    """

    denoise: Denoise
    size: tuple[int, int]
    stride: int

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= min(self.size):
            raise ValueError(f"windows of {self.size} need a stride from 1 to {min(self.size)}, got {self.stride}")

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoise.schedule

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        return self._put_together(x, lambda part: self.denoise(part, t))

    def jump(self, x: Tensor, t: Tensor, s: Tensor) -> Denoised:
        """See `ldm.jumps.Jump`: a mean of pairs takes x to the mean of where they do."""
        return self._put_together(x, lambda part: jumping(self.denoise).jump(part, t, s))

    def _put_together(self, x: Tensor, answer: Callable[[Tensor], Denoised]) -> Denoised:
        def call(rows: slice, columns: slice) -> dict[str, Tensor]:
            ends = answer(x[..., rows, columns])._asdict()
            return {name: part for name, part in ends.items() if part is not None}

        windows = windows_of(x, self.size, self.stride)
        return answer(x) if len(windows) == 1 else Denoised(**averaged(windows, x, call))


Span2 = tuple[slice, slice]  # rows and columns


def windows_of(x: Tensor, size: tuple[int, int], stride: int) -> list[Span2]:
    """The windows over x (B, C, h, w), from the upper left on."""
    return list(product(_spans(x.shape[-2], size[0], stride), _spans(x.shape[-1], size[1], stride)))


def averaged(windows: Sequence[Span2], x: Tensor, call: Callable[[slice, slice], Mapping[str, Tensor]],
             ) -> dict[str, Tensor]:
    """sum_i w_i call(window i) / sum_i w_i, by name: of the sides of x, with as many channels as there are; summed in
    the dtype of x, for answers under autocast have eight bits."""
    weight, sums = torch.zeros_like(x[:1, :1]), dict[str, Tensor]()
    for rows, columns in windows:
        tent = _tent(rows, x)[:, None] * _tent(columns, x)
        weight[..., rows, columns] += tent
        for name, part in call(rows, columns).items():
            whole = sums.setdefault(name, x.new_zeros(*part.shape[:2], *x.shape[2:]))
            whole[..., rows, columns] += tent * part
    return {name: total / weight for name, total in sums.items()}


def _spans(side: int, window: int, stride: int) -> list[slice]:
    """The windows along one side."""
    if side <= window:
        return [slice(0, side)]
    return [slice(start, start + window) for start in [*range(0, side - window, stride), side - window]]


def _tent(span: slice, like: Tensor) -> Tensor:
    """1, 2, ... to the middle of a span and back to 1."""
    rising = torch.arange(1, span.stop - span.start + 1, device=like.device, dtype=like.dtype)
    return rising.minimum(rising.flip(0))


def hole_in_latents(mask: Tensor, factor: int, dilate: int = 0) -> Tensor:
    """The hole in latents, (B or 1, 1, H / factor, W / factor): every latent with a pixel in it, and `dilate` more.

    `dilate`, in latents, is for the encoder's receptive field: latents near the hole have seen what was in it. Raises
    ValueError for what is no mask, and for sides that `factor` does not divide.
    """
    _check_mask(mask)
    if mask.shape[-2] % factor or mask.shape[-1] % factor:
        raise ValueError(f"a mask of {tuple(mask.shape[-2:])} pixels is not divisible by the autoencoder's factor "
                         f"{factor}: bring picture and mask to a size that is")
    pooled = max_pool2d(mask.float(), factor)
    return max_pool2d(pooled, 2 * dilate + 1, stride=1, padding=dilate) > 0


def filled(images: Tensor, mask: Tensor, how: Literal["grey", "nearest"] = "nearest") -> Tensor:
    """Images (B, C, H, W) in [-1, 1] with nothing left of what the hole covers, to be encoded.

    `grey` is 0; `nearest` is the nearest pixel outside the hole, in Euclidean distance. Raises ValueError for what is
    no mask, another `how`, and for `nearest` where the hole is everything.
    """
    _check_mask(mask)
    if how == "grey":
        return images.masked_fill(mask, 0)
    if how != "nearest":
        raise ValueError(f"a hole is filled with 'grey' or 'nearest', got {how!r}")
    if bool(mask.flatten(1).all(1).any()):
        raise ValueError("a hole that covers the whole picture leaves no pixel to fill it with: fill it with 'grey'")
    _, place = _nearest(~mask)
    places = place.flatten(2).expand(*images.shape[:2], -1)
    return images.flatten(2).gather(2, places).view_as(images)


def composite(made: Tensor, source: Tensor, mask: Tensor, feather: int = 0) -> Tensor:
    """`made` in the hole, `source` outside, both uint8 (B, C, H, W): from `feather` + 1 pixels on, bit for bit.

    In between the share of `made` falls smoothly (3 w^2 - 2 w^3, w = 1 - distance / (feather + 1)): the ramp lies
    around the hole, in which nothing of the source is left. Raises ValueError for what is no mask, and for other
    pixels.
    """
    _check_mask(mask)
    if made.dtype != torch.uint8 or source.dtype != torch.uint8:
        raise ValueError(f"pictures are put together in uint8, got {made.dtype} and {source.dtype}")
    if feather < 0:
        raise ValueError(f"feather is a width of at least 0 pixels, got {feather}")
    if feather == 0:
        return torch.where(mask, made, source)
    squared, _ = _nearest(mask)
    near = (1 - squared.sqrt() / (feather + 1)).clamp(min=0)
    share = near**2 * (3 - 2 * near)
    return torch.lerp(source.float(), made.float(), share).round().to(torch.uint8)


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"a mask is bool and (B or 1, 1, H, W), True in the hole, got {mask.dtype} of shape "
                         f"{tuple(mask.shape)}")


def _nearest(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """For each pixel of (B, 1, H, W) the squared distance to the nearest wanted one, and that one's row * W + column.

    First along each column, then along each row over the columns' answers: exact. Where none is wanted the distance is
    infinite, and the place means nothing. Felzenszwalb & Huttenlocher 2012.
    """
    height, width = wanted.shape[-2:]
    rows, columns = (torch.arange(side, device=wanted.device, dtype=torch.float32) for side in (height, width))
    rows = rows[:, None].expand(wanted.shape)
    above = rows.where(wanted, -torch.inf).cummax(-2).values
    below = rows.where(wanted, torch.inf).flip(-2).cummin(-2).values.flip(-2)
    row = torch.where(rows - above <= below - rows, above, below)
    gap, across = (row - rows) ** 2, (columns[:, None] - columns) ** 2
    # Row by row, so that the memory is that of one row's W x W distances.
    best = [(across + line[..., None, :]).min(-1) for line in gap.unbind(-2)]
    squared, column = (torch.stack(part, -2) for part in zip(*best, strict=True))
    return squared, row.long().gather(-1, column) * width + column


def adain(content: Tensor, style: Tensor) -> Tensor:
    """`content` (B, C, h, w) with each channel's mean and standard deviation those of `style` (B or 1, C, ...).

    std_s (x - mean_c) / std_c + mean_s, per sample; a constant channel takes the mean. Huang & Belongie 2017 (arXiv
    1703.06868), eq. 8; on latents: Chung et al. 2024 (arXiv 2312.09008).
    """
    (std, mean), (wanted, centre) = (torch.std_mean(x.flatten(2), dim=2, keepdim=True) for x in (content, style))
    whitened = (content.flatten(2) - mean) / std.clamp(min=torch.finfo(std.dtype).tiny)
    return (wanted * whitened + centre).view_as(content)
