"""What of one set of pictures lies among another, by nearest neighbours: precision, recall, density, coverage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 256  # of a matrix of distances at once


class Neighbours(NamedTuple):
    """Of each picture, one number."""

    precise: Tensor  # (M,) bool: the other set's picture lies in the ball of a real one
    recalled: Tensor  # (N,) bool: the real picture lies in the ball of one of the other set
    density: Tensor  # (M,): in how many balls of real pictures, divided by k
    covered: Tensor  # (N,) bool: a picture of the other set lies in its ball


def neighbours(real: Tensor, other: Tensor, k: int, k_density: int) -> Neighbours:
    """Features (N, D), (M, D) -> what `Neighbours` says, by Euclidean balls.

    A ball of a picture reaches to the `k`-th nearest other of its own set. Precision and recall (Kynkaanniemi et al.
    2019, k = 3): within the closed balls. Density and coverage (Naeem et al. 2020, k = 5 = `k_density`): within the
    open ones, as the authors compute it, so that a set has density 1 in itself. ValueError for k or fewer pictures.
    """
    largest = max(k, k_density)
    if min(len(real), len(other)) <= largest:
        raise ValueError(f"{largest} nearest neighbours need more than {largest} pictures in each set.")
    radii, radii_other = _radii(real, (k, k_density)), _radii(other, (k,))
    precise = torch.zeros(len(other), dtype=torch.bool)
    density = torch.zeros(len(other), dtype=torch.float64)
    recalled, covered = [], []
    for first in range(0, len(real), ROWS):
        part = slice(first, first + ROWS)
        apart = distances(real[part], other)
        precise |= (apart <= radii[part, :1]).any(0)
        density += (apart < radii[part, 1:]).sum(0).double() / k_density
        recalled.append((apart <= radii_other[:, 0]).any(1))
        covered.append(apart.amin(1) < radii[part, 1])
    return Neighbours(precise, torch.cat(recalled), density, torch.cat(covered))


def distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, M), from differences: equal pictures are exactly 0 apart, which the quicker formula does not give."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(rows: Tensor, ks: tuple[int, ...]) -> Tensor:
    """The distance of each picture to its k-th nearest other, (N, number of ks)."""
    found = []
    for first in range(0, len(rows), ROWS):
        apart = distances(rows[first : first + ROWS], rows)
        nearest = apart.topk(max(ks) + 1, largest=False).values  # the first is the picture itself
        found.append(nearest[:, list(ks)])
    return torch.cat(found)
