"""Squared maximum mean discrepancies, with as little memory for many pictures as for few: KID's kernel, and CMMD's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 512  # of a kernel matrix at once


class Kernel(ABC):
    """k(x, y) of features."""

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """(N, D), (M, D) -> (N, M)."""

    @abstractmethod
    def diagonal(self, x: Tensor) -> Tensor:
        """k(x_i, x_i): (N, D) -> (N,)."""


@dataclass(frozen=True)
class Cubic(Kernel):
    """(x.y / D + 1)^3 (Binkowski et al. 2018, KID)."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def diagonal(self, x: Tensor) -> Tensor:
        return (x.square().mean(1) + 1) ** 3


@dataclass(frozen=True)
class Gaussian(Kernel):
    """exp(-|x - y|^2 / (2 sigma^2)) (Jayasumana et al. 2024, CMMD, where sigma is 10)."""

    sigma: float = 10.0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
        return torch.exp(-squares.clamp(min=0) / (2 * self.sigma**2))

    def diagonal(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), dtype=x.dtype)


class Sums(NamedTuple):
    """Of weights (B, N), (B, M): sum_ij w_i w_j k(x_i, x_j) within sets and across, and its part where i = j. (B,)."""

    aa: Tensor
    bb: Tensor
    ab: Tensor
    diagonal_a: Tensor
    diagonal_b: Tensor


def sums(kernel: Kernel, a: Tensor, b: Tensor, weights_a: Tensor, weights_b: Tensor) -> Sums:
    """Of features (N, D), (M, D), in float64; ROWS rows of a kernel matrix are held at once."""
    a, b = a.double(), b.double()

    def form(x: Tensor, y: Tensor, left: Tensor, right: Tensor) -> Tensor:
        total = torch.zeros(len(left), dtype=torch.float64)
        for first in range(0, len(x), ROWS):
            part = slice(first, first + ROWS)
            total += (left[:, part] * (right @ kernel(x[part], y).T)).sum(1)
        return total

    own_a, own_b = weights_a.square() @ kernel.diagonal(a), weights_b.square() @ kernel.diagonal(b)
    within = form(a, a, weights_a, weights_a), form(b, b, weights_b, weights_b)
    return Sums(*within, form(a, b, weights_a, weights_b), own_a, own_b)


def unbiased(found: Sums, weights_a: Tensor, weights_b: Tensor) -> Tensor:
    """The U-statistic (B,): pairs of two different pictures alone, so that its mean over equal distributions is 0. A
    picture that was drawn twice is no pair."""

    def pairs(total: Tensor, diagonal: Tensor, weights: Tensor) -> Tensor:
        return (total - diagonal) / (weights.sum(1).square() - weights.square().sum(1))

    across = found.ab / (weights_a.sum(1) * weights_b.sum(1))
    return pairs(found.aa, found.diagonal_a, weights_a) + pairs(found.bb, found.diagonal_b, weights_b) - 2 * across


def biased(found: Sums, weights_a: Tensor, weights_b: Tensor) -> Tensor:
    """The V-statistic (B,), with the pairs of a picture and itself: never below 0, and larger for fewer pictures."""
    a, b = weights_a.sum(1), weights_b.sum(1)
    return found.aa / a.square() + found.bb / b.square() - 2 * found.ab / (a * b)
