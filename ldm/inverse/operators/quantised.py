"""JPEG: what a picture keeps when its blocks' cosine coefficients are rounded to multiples of a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.inverse.operators.base import Operator, shape_of, unrounded

F64 = torch.float64
# ITU-T T.81, tables K.1 and K.2, by rows.
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *[(99,) * 8] * 4,
)  # fmt: skip
# Rows are Y, Cb and Cr of RGB (JFIF 1.02); Cb and Cr are differences from Y over the range they then have.
Y = (0.299, 0.587, 0.114)
YCBCR = (
    Y,
    tuple((one - y) / (2 * (1 - Y[2])) for one, y in zip((0, 0, 1), Y, strict=True)),
    tuple((one - y) / (2 * (1 - Y[0])) for one, y in zip((1, 0, 0), Y, strict=True)),
)


@dataclass(frozen=True, kw_only=True)
class JPEG(Operator):
    """The picture that a JPEG file of `quality` 1 to 100 stores, of libjpeg's tables and no reduced colours.

    x in [-1, 1] is 127.5 (x + 1) - 128; three channels turn to YCbCr, one stays. The cosine transform of each block of
    8 x 8 pixels is rounded to multiples of the table, and everything is turned back. The gradient takes rounding for
    the identity. A decoder's own rounding to whole levels and its cut to [-1, 1] are left out, so that A(A(x)) = A(x).
    """

    kind: Literal["jpeg"] = "jpeg"
    quality: int = 50
    limits: ClassVar = {"quality": "[1, 100]"}

    def __call__(self, x: Tensor) -> Tensor:
        channels, height, width = self.domain(x)
        colours, rgb, cosines, quanta = _constants(self, channels, x.device, x.dtype)
        with unrounded(x):
            levels = torch.einsum("dc,bchw->bdhw", colours, 127.5 * x - 0.5)
            blocks = levels.reshape(-1, channels, height // 8, 8, width // 8, 8).movedim(4, 3)
            steps = cosines @ blocks @ cosines.mT / quanta
            # Straight through: the difference is exact, and so is the sum.
            steps = steps + (steps.round() - steps).detach()
            levels = (cosines.mT @ (steps * quanta) @ cosines).movedim(3, 4).reshape(levels.shape)
            return (torch.einsum("dc,bchw->bdhw", rgb, levels) + 0.5) / 127.5

    def tables(self) -> Tensor:
        """The quanta (3, 8, 8) of Y, Cb and Cr, in levels of a 255th; by rows, as libjpeg scales them."""
        percent = 5000 // self.quality if self.quality < 50 else 200 - 2 * self.quality
        tables = torch.tensor([LUMA, CHROMA, CHROMA])
        return ((tables * percent + 50) // 100).clamp(1, 255)

    def domain(self, y: Tensor) -> tuple[int, int, int]:
        channels, height, width = shape_of(y)
        if channels not in (1, 3) or height % 8 or width % 8:
            raise ValueError(f"jpeg takes 1 or 3 channels and sides divisible by 8, got {channels} of "
                             f"{width} x {height}: take RGB pictures of sides such as {-(-height // 8) * 8}")
        return channels, height, width


@lru_cache(maxsize=16)
def _constants(jpeg: JPEG, channels: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The colours (C, C), their inverse, the orthonormal cosine transform (8, 8) of T.81, A.3.3, and the quanta."""
    with torch.inference_mode(False):  # a tensor made in that mode could never serve a gradient
        colours = torch.tensor(YCBCR, dtype=F64) if channels == 3 else torch.eye(1, dtype=F64)
        k, n = torch.arange(8, dtype=F64)[:, None], torch.arange(8, dtype=F64)
        cosines = torch.cos(math.pi * k * (2 * n + 1) / 16) / 2
        cosines[0] /= math.sqrt(2)
        parts = colours, torch.linalg.inv(colours), cosines, jpeg.tables()[:channels, None, None]
        return [part.to(device, dtype) for part in parts]


OPERATORS = (JPEG,)
