"""Dynamic thresholding: pictures in [-1, 1] that guidance has driven beyond their range are scaled back into it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.diffusion import Denoised, with_x0
from ldm.jumps import jumping
from ldm.schedules import NoiseSchedule

USUAL = 0.995  # the paper's p


@dataclass(frozen=True)
class Thresholded(Denoise):
    """A denoiser of pixels whose x0 lies in [-1, 1], and the pair completed for the same x_t:

        s = max(1, the quantile p of |x0|),    x0' = clip(x0, -s, s) / s

    each sample by itself. It stands around guidance, and a measurement around it. Saharia et al. 2022 (arXiv
    2205.11487), section 2.3. Of jumps it scales those that land at t = 0: the x0 of another is no picture. Raises
    ValueError for a `quantile` outside (0, 1].
    """

    denoise: Denoise
    quantile: float = USUAL

    def __post_init__(self) -> None:
        if not 0 < self.quantile <= 1:
            raise ValueError(f"dynamic_threshold, a quantile of |x0|, must lie in (0, 1], got {self.quantile}")

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoise.schedule

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        return self._scaled(self.denoise(x, t), t)

    def jump(self, x: Tensor, t: Tensor, s: Tensor) -> Denoised:
        """See `ldm.jumps.Jump`."""
        ends = jumping(self.denoise).jump(x, t, s)
        return self._scaled(ends, t) if s == 0 else ends

    def _scaled(self, ends: Denoised, t: Tensor) -> Denoised:
        return with_x0(ends, thresholded(ends.x0, self.quantile), self.schedule(t))


def thresholded(x0: Tensor, quantile: float) -> Tensor:
    """clip(x0, -s, s) / s of x0 (B, ...), with s = `bound`."""
    s = bound(x0, quantile)
    return x0.minimum(s).maximum(-s) / s


def bound(x0: Tensor, quantile: float) -> Tensor:
    """max(1, quantile of |x0|) of each sample, kept broadcastable; linear between order statistics."""
    sizes = x0.abs().flatten(1)
    rank = quantile * (sizes.shape[1] - 1)
    below = min(int(rank), sizes.shape[1] - 2) if sizes.shape[1] > 1 else 0
    # torch.quantile sorts everything, and takes no more than 2^24 numbers.
    low, high = (sizes.kthvalue(min(k, sizes.shape[1]), dim=1).values for k in (below + 1, below + 2))
    return torch.lerp(low, high, rank - below).clamp(min=1).view(-1, *[1] * (x0.ndim - 1))
