"""Linear operators that are known by their singular value decomposition: all they offer follows from it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.inverse.operators.base import LinearOperator, Spectrum, shape_of
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
    def factors(self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Factors:
        """The decomposition for x of (C, H, W), which is kept: a later call copies nothing to the device. Raises
        ValueError for a size that does not fit."""

    def __call__(self, x: Tensor) -> Tensor:
        f = _factors(self, shape_of(x), x.device, x.dtype)
        return f.emit(f.singular * f.analyse(x))

    def adjoint(self, y: Tensor) -> Tensor:
        f = _factors(self, self.domain(y), y.device, y.dtype)
        return f.synthesise(f.singular * f.observe(y))

    def pinv(self, y: Tensor) -> Tensor:
        f = _factors(self, self.domain(y), y.device, y.dtype)
        return f.synthesise(_inverse(f.singular) * f.observe(y))

    def solve(self, residual: Tensor, scale: Tensor | float, noise: Tensor | float) -> Tensor:
        f = _factors(self, self.domain(residual), residual.device, residual.dtype)
        denominator = _coefficient(scale, residual) * f.singular.square() + _coefficient(noise, residual)
        return f.emit(_inverse(denominator) * f.observe(residual))

    def spectrum(self, shape: tuple[int, int, int], like: Tensor) -> Spectrum:
        f = _factors(self, shape, like.device, like.dtype)
        return Spectrum(f.singular, f.analyse, f.synthesise, lambda y: (f.singular > 0) * f.observe(y))


@lru_cache(maxsize=16)
def _factors(operator: Spectral, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Factors:
    with torch.inference_mode(False):  # a tensor made in that mode could never serve a gradient
        return operator.factors(shape, device, dtype)


def kept(singular: Tensor) -> Tensor:
    """The singular values, 0 for those that are next to none: no inverse multiplies a rounding error by more than
    1 / LOST."""
    return singular * (singular > LOST * singular.max())


def _inverse(values: Tensor) -> Tensor:
    """1 / value, and 0 of 0."""
    some = values > 0
    return some / torch.where(some, values, 1)


def _coefficient(value: Tensor | float, like: Tensor) -> Tensor:
    return match(value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64), like)
