"""Operators without a pseudo-inverse: magnitudes of Fourier transforms, clipped light, and any one behind a decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from autoencoder.base import full_precision
from ldm.inverse.operators.base import Operator, shape_of


@dataclass(frozen=True, kw_only=True)
class Phase(Operator):
    """Phase retrieval: y = |F pad(x)|, the magnitudes of the unitary two-dimensional Fourier transform.

    pad puts x into a field of 0, mid-grey, of `oversample` times its sides. y is (B, C, H oversample, W oversample) and
    >= 0. It is the same of -x, of x turned by 180 degrees, and of what is shifted inside the field, so that a result is
    judged up to these.
    """

    kind: Literal["phase"] = "phase"
    oversample: int = 2
    limits: ClassVar = {"oversample": "[1, inf)"}

    def __call__(self, x: Tensor) -> Tensor:
        sides = [side * self.oversample for side in shape_of(x)[1:]]
        wide = full_precision(x)  # no Fourier transform of shorter numbers
        spectrum: Tensor = torch.fft.fft2(wide, s=sides, norm="ortho")
        return spectrum.abs().to(x.dtype)

    def domain(self, y: Tensor) -> tuple[int, int, int]:
        channels, height, width = shape_of(y)
        if height % self.oversample or width % self.oversample:
            raise ValueError(f"phase gives sides that are multiples of oversample {self.oversample}, got y of "
                             f"{width} x {height}: give the magnitudes of the padded picture")
        return channels, height // self.oversample, width // self.oversample


@dataclass(frozen=True, kw_only=True)
class HDR(Operator):
    """High dynamic range: y = clip(scale x, -1, 1), so that of a picture of [-1, 1] both ends are cut off.

    Values beyond 1 / scale are lost, and the gradient there is 0.
    """

    kind: Literal["hdr"] = "hdr"
    scale: float = 2.0
    limits: ClassVar = {"scale": "(0, inf)"}

    def __call__(self, x: Tensor) -> Tensor:
        shape_of(x)
        return (self.scale * x).clamp(-1, 1)

    def domain(self, y: Tensor) -> tuple[int, int, int]:
        return shape_of(y)


@dataclass(frozen=True)
class Decoded(Operator):
    """An operator of pictures seen by latents: z (B, C, h, w) of `shape` (C, h, w) to operator(decode(z)).

    `decode` is differentiable, and a sample's picture does not depend on its batch. `encode`, picture to latents, is
    for those who ask for it.
    """

    operator: Operator
    decode: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int]
    encode: Callable[[Tensor], Tensor] | None = None
    kind: Literal["decoded"] = "decoded"

    def __call__(self, x: Tensor) -> Tensor:
        if shape_of(x) != tuple(self.shape):
            raise ValueError(f"an operator behind a decoder takes latents of {tuple(self.shape)}, got {shape_of(x)}: "
                             "encode a picture of the measurement's size")
        return self.operator(self.decode(x))

    def domain(self, y: Tensor) -> tuple[int, int, int]:
        self.operator.domain(y)
        return self.shape


OPERATORS = (Phase, HDR)
