"""Blurs: circular convolutions, which the Fourier basis makes products."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.inverse.operators.base import shape_of
from ldm.inverse.operators.spectral import Factors, Spectral, kept

F64 = torch.float64


@dataclass(frozen=True, kw_only=True)
class Circular(Spectral):
    """Convolution of each channel with a kernel of `taps` along the sides, as if the picture's edges met.

    A kernel longer than a side wraps around it; even taps spread a point one pixel further back than ahead.
    Frequencies that pass by less than 1e-4 (`LOST`) are taken out wholly, so that no inverse raises rounding errors to
    pictures. Coefficients are complex: V^T x is the unitary Fourier transform, U^T y that by the transfer's phase.
    """

    kind: str
    taps: int
    limits: ClassVar = {"taps": "[1, inf)"}

    @abstractmethod
    def kernel(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """The weights along height and width at whole `offsets` from the centre, in float64; each sums to 1."""

    def factors(self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Factors:
        offsets = torch.arange(self.taps, dtype=F64) - self.taps // 2
        rows, columns = self.kernel(offsets)
        transfer = _response(rows, offsets, shape[1])[:, None] * _response(columns, offsets, shape[2])
        gain = kept(transfer.abs())
        phase = torch.where(gain > 0, transfer / transfer.abs(), 1)
        wide = torch.promote_types(dtype, torch.float32)  # no Fourier transform of shorter numbers
        gain, phase = gain.to(device, wide), phase.to(device, wide.to_complex())

        def analyse(x: Tensor) -> Tensor:
            coefficients: Tensor = torch.fft.fft2(x.to(wide), norm="ortho")
            return coefficients

        def synthesise(c: Tensor) -> Tensor:
            picture: Tensor = torch.fft.ifft2(c, norm="ortho").real
            return picture.to(dtype)

        return Factors(gain, analyse, synthesise, lambda y: phase.conj() * analyse(y), lambda c: synthesise(phase * c))

    def domain(self, y: Tensor) -> tuple[int, int, int]:
        return shape_of(y)


def _response(weights: Tensor, offsets: Tensor, side: int) -> Tensor:
    """sum_j w_j exp(-2 pi i k j / side) for each k."""
    # Whole turns are taken off before the exponential, which then keeps its digits.
    turns = (torch.arange(side, dtype=F64)[:, None] * offsets).remainder(side) / side
    return torch.exp(-2j * math.pi * turns) @ weights.to(torch.complex128)


@dataclass(frozen=True, kw_only=True)
class GaussianBlur(Circular):
    """Blur by exp(-j^2 / 2 std^2) at j pixels from the centre, cut off to `taps` pixels along each side."""

    kind: Literal["gaussian-blur"] = "gaussian-blur"
    std: float = 3.0
    taps: int = 61
    limits: ClassVar = {**Circular.limits, "std": "(0, inf)"}

    def kernel(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.exp(-0.5 * (offsets / self.std).square())
        return weights / weights.sum(), weights / weights.sum()


@dataclass(frozen=True, kw_only=True)
class MotionBlur(Circular):
    """The mean of `taps` neighbours along one side: a camera that moves evenly while it looks."""

    kind: Literal["motion-blur"] = "motion-blur"
    taps: int = 9
    direction: Literal["horizontal", "vertical"] = "horizontal"

    def kernel(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        along, across = torch.full_like(offsets, 1 / len(offsets)), (offsets == 0).to(F64)
        return (across, along) if self.direction == "horizontal" else (along, across)


OPERATORS = (GaussianBlur, MotionBlur)
