"""What every operator A of y = A x0 + sigma_y n is, and what a linear one offers beside its call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ldm.checks import Checked


class Operator(Checked, ABC):
    """A differentiable map of x (B, C, H, W) to y (B, ...), sample by sample: a frozen dataclass of its settings.

    Pictures have values in [-1, 1]. The shape of y is that of the call on zeros.
    """

    linear: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """y = A x. Raises ValueError for an x that does not fit, with the next step."""

    @abstractmethod
    def domain(self, y: Tensor) -> tuple[int, int, int]:
        """(C, H, W) of what y was measured of. Raises ValueError for a y that A cannot have given."""


class Spectrum(NamedTuple):
    """The singular value decomposition A = U S V^T, in coefficients of x's size: `singular` >= 0, broadcastable to
    them, 0 where A sees nothing; V^T x and U^T y may be complex, of a real x or y."""

    singular: Tensor
    analyse: Callable[[Tensor], Tensor]  # V^T x
    synthesise: Callable[[Tensor], Tensor]  # V x, the inverse of `analyse`
    observe: Callable[[Tensor], Tensor]  # U^T y, 0 where singular is 0


class LinearOperator(Operator):
    """An operator with a true adjoint, a pseudo-inverse and solves in closed form."""

    linear = True

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, so that <A x, y> = <x, A^T y>."""

    @abstractmethod
    def pinv(self, y: Tensor) -> Tensor:
        """A^+ y: of least norm among the x whose A x is nearest to y."""

    @abstractmethod
    def solve(self, residual: Tensor, scale: Tensor | float, noise: Tensor | float) -> Tensor:
        """(scale A A^T + noise I)^-1 residual, both numbers or (B,); at noise 0 the pseudo-inverse."""

    @abstractmethod
    def spectrum(self, shape: tuple[int, int, int], like: Tensor) -> Spectrum:
        """The decomposition for x of (C, H, W), on the device and of the precision of `like`."""


def shape_of(picture: Tensor) -> tuple[int, int, int]:
    """(C, H, W) of a batch of pictures. Raises ValueError for another number of dimensions."""
    if picture.ndim != 4:
        raise ValueError(f"an operator takes a batch (B, C, H, W), got shape {tuple(picture.shape)}: "
                         "add the dimensions that lack, as x[None] does")
    return picture.shape[1], picture.shape[2], picture.shape[3]


def unrounded(x: Tensor) -> AbstractContextManager[object]:
    """Where products keep x's precision: those of autocast keep 8 bits."""
    place = x.device.type
    return torch.autocast(place, enabled=False) if torch.amp.is_autocast_available(place) else nullcontext()
