"""Linear operators that are known by their singular value decomposition: all they offer follows from it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.inverse.operators.base import LinearOperator, Spectrum
from ldm.schedules import match

LOST = 1e-4  # of the largest singular value: what is let through by less is not let through, in A as in its inverse


class Factors(NamedTuple):
    """A = U S V^T on coefficients of x's size, U being complete: y is `emit(observe(y))`, in its whole space."""

    singular: Tensor
    analyse: Callable[[Tensor], Tensor]  # V^T x
    synthesise: Callable[[Tensor], Tensor]  # V c
    observe: Callable[[Tensor], Tensor]  # U^T y, with zeros up to x's size
    emit: Callable[[Tensor], Tensor]  # U c


class Spectral(LinearOperator):
    """An operator that states its factors."""

    @abstractmethod
    def factors(self, shape: tuple[int, int, int], like: Tensor) -> Factors:
        """The decomposition for x of (C, H, W). Raises ValueError for a size that does not fit."""

    def __call__(self, x: Tensor) -> Tensor:
        f = self.factors(shape_of(x), x)
        return f.emit(f.singular * f.analyse(x))

    def adjoint(self, y: Tensor) -> Tensor:
        f = self.factors(self.domain(y), y)
        return f.synthesise(f.singular * f.observe(y))

    def pinv(self, y: Tensor) -> Tensor:
        f = self.factors(self.domain(y), y)
        return f.synthesise(_inverse(f.singular) * f.observe(y))

    def solve(self, residual: Tensor, scale: Tensor | float, noise: Tensor | float) -> Tensor:
        f = self.factors(self.domain(residual), residual)
        denominator = _coefficient(scale, residual) * f.singular.square() + _coefficient(noise, residual)
        return f.emit(_inverse(denominator) * f.observe(residual))

    def spectrum(self, shape: tuple[int, int, int], like: Tensor) -> Spectrum:
        f = self.factors(shape, like)
        return Spectrum(f.singular, f.analyse, f.synthesise, lambda y: (f.singular > 0) * f.observe(y))


def kept(singular: Tensor) -> Tensor:
    """The singular values, 0 for those that are next to none: no inverse multiplies a rounding error by more than
    1 / LOST."""
    return singular * (singular > LOST * singular.max())


def shape_of(picture: Tensor) -> tuple[int, int, int]:
    """(C, H, W) of a batch of pictures. Raises ValueError for another number of dimensions."""
    if picture.ndim != 4:
        raise ValueError(f"an operator takes a batch (B, C, H, W), got shape {tuple(picture.shape)}: "
                         "add the dimensions that lack, as x[None] does")
    return picture.shape[1], picture.shape[2], picture.shape[3]


def _inverse(values: Tensor) -> Tensor:
    """1 / value, and 0 of 0."""
    some = values > 0
    return some / torch.where(some, values, 1)


def _coefficient(value: Tensor | float, like: Tensor) -> Tensor:
    return match(torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64), like)
