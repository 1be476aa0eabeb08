"""Operators that are a product of small matrices, one along each dimension they act on."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.inverse.operators.base import shape_of, unrounded
from ldm.inverse.operators.spectral import Factors, Spectral, kept

F64 = torch.float64


class Separable(Spectral):
    """One matrix along each of `dims`: singular values and bases are products of the matrices' own."""

    dims: ClassVar[tuple[int, ...]]  # negative, of (C, H, W)

    @abstractmethod
    def matrix(self, side: int) -> Tensor:
        """(m, side) in float64, m <= side. Raises ValueError for a side that does not fit."""

    def factors(self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Factors:
        values, *bases = zip(*(_decomposed(self.matrix(shape[dim])) for dim in self.dims), strict=True)
        singular = math.prod(value.view(-1, *[1] * (-1 - dim)) for dim, value in zip(self.dims, values, strict=True))
        maps = [partial(_along, self.dims, [part.to(device, dtype) for part in parts]) for parts in bases]
        return Factors(kept(singular).to(device, dtype), *maps)


def _decomposed(matrix: Tensor) -> tuple[Tensor, ...]:
    """The singular values (n), and V^T (n, n), V (n, n), U^T (n, m), U (m, n) of a matrix U S V^T (m, n)."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=True)
    u, s = (pad(part, (0, len(vt) - len(s))) for part in (u, s))
    return s, vt, vt.mT, u.mT, u


def _along(dims: Sequence[int], matrices: Sequence[Tensor], x: Tensor) -> Tensor:
    """x with a matrix applied along each of its dimensions `dims`."""
    with unrounded(x):
        for dim, matrix in zip(dims, matrices, strict=True):
            x = (x.movedim(dim, -1) @ matrix.mT).movedim(-1, dim)
    return x


@dataclass(frozen=True, kw_only=True)
class Downsampling(Separable):
    """A picture with sides of 1 / factor, by one rule along both of them."""

    kind: str
    factor: int = 4
    limits: ClassVar = {"factor": "[1, inf)"}
    dims: ClassVar = (-2, -1)

    @abstractmethod
    def weights(self, side: int) -> Tensor:
        """(side / factor, side): what a small pixel takes of the large ones, up to a factor for each row."""

    def matrix(self, side: int) -> Tensor:
        if side % self.factor:
            fits = -(-side // self.factor) * self.factor
            raise ValueError(f"{self.kind}: side {side} is not divisible by factor {self.factor}: "
                             f"take pictures of sides such as {fits}, or another factor")
        weights = self.weights(side)
        return weights / weights.sum(1, keepdim=True)

    def offsets(self, side: int) -> Tensor:
        """(side / factor, side): how far the large pixels lie from the centre of a small one, in small pixels."""
        small, large = torch.arange(side // self.factor, dtype=F64) + 0.5, torch.arange(side, dtype=F64) + 0.5
        return large / self.factor - small[:, None]

    def domain(self, y: Tensor) -> tuple[int, int, int]:
        channels, height, width = shape_of(y)
        return channels, height * self.factor, width * self.factor


@dataclass(frozen=True, kw_only=True)
class Box(Downsampling):
    """The mean of each square of factor x factor pixels.

    A A^T = I / factor^2, A^T y is y / factor^2 repeated over the square, and A^+ y is y repeated.
    """

    kind: Literal["box"] = "box"

    def weights(self, side: int) -> Tensor:
        return (self.offsets(side).abs() < 0.5).to(F64)


@dataclass(frozen=True, kw_only=True)
class Bicubic(Downsampling):
    """Bicubic reduction with antialiasing: the kernel of a = -1/2, stretched by the factor, cut off at the edges.

    That is `torch.nn.functional.interpolate(mode="bicubic", antialias=True)`; without antialias torch takes a = -3/4 on
    four pixels whatever the factor, which is another operator. Keys 1981, eq. 15.
    """

    kind: Literal["bicubic"] = "bicubic"

    def weights(self, side: int) -> Tensor:
        u = self.offsets(side).abs()
        near, far = (1.5 * u - 2.5) * u**2 + 1, ((-0.5 * u + 2.5) * u - 4) * u + 2
        return torch.where(u < 1, near, torch.where(u < 2, far, 0))


@dataclass(frozen=True, kw_only=True)
class Grey(Separable):
    """One channel, the weighted sum of three: by default the luma of ITU-R BT.601. A A^T = ||weights||^2 I."""

    kind: Literal["grey"] = "grey"
    weights: tuple[float, float, float] = (0.299, 0.587, 0.114)
    dims: ClassVar = (-3,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.weights):
            raise ValueError("grey weights must not all be 0: without weights of its own, grey is the luma")

    def matrix(self, side: int) -> Tensor:
        if side != len(self.weights):
            raise ValueError(f"grey takes pictures of {len(self.weights)} channels, got {side}: give RGB pictures")
        return torch.tensor([self.weights], dtype=F64)

    def domain(self, y: Tensor) -> tuple[int, int, int]:
        channels, height, width = shape_of(y)
        if channels != 1:
            raise ValueError(f"grey gives pictures of 1 channel, got {channels}: give y as one channel")
        return len(self.weights), height, width


OPERATORS = (Box, Bicubic, Grey)
