"""95 % intervals of what is measured on sets of pictures, by resampling the pictures.

The interval of a distance is its value ± 1.96 standard deviations of it over resamples of the pictures. The quantiles
themselves would mislead: a resample holds some 63 % of the distinct pictures, and distances that are biased in the
number of pictures, as Frechet's, are larger for it. The interval is of the distance at this number of pictures.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Z = 1.959964  # of a normal variable, 95 % lies within so many deviations
REPLICATES, FEWEST = 200, 20
BUDGET = 3e11  # multiplications that the resamples of one distance may take, unless there would be fewer than FEWEST


def replicates(cost: float) -> int:
    """How many resamples, where one takes `cost` multiplications: FEWEST to REPLICATES."""
    return max(FEWEST, min(REPLICATES, int(BUDGET / max(1.0, cost))))


def resamples(size: int, count: int, seed: int) -> Tensor:
    """Positions (count, size) drawn with replacement from `size` pictures, keyed by `seed`."""
    return torch.randint(size, (count, size), generator=torch.Generator().manual_seed(seed))


def multiplicities(positions: Tensor) -> Tensor:
    """How often each picture stands in each resample: (count, size) -> (count, size) float64."""
    counts = torch.zeros(positions.shape, dtype=torch.float64)
    return counts.scatter_add_(1, positions, torch.ones_like(counts))


def around(value: float, deviation: float, least: float = -float("inf")) -> list[float]:
    """value ± 1.96 deviations, from `least` on."""
    return [max(least, value - Z * deviation), value + Z * deviation]


def of_sets(
    distance: Callable[[Tensor, Tensor], float], a: Tensor, b: Tensor, count: int, seed: int, paired: bool = False
) -> float:
    """The standard deviation of distance(a, b) over `count` resamples of both sets (N, D), (M, D).

    `paired`: picture i of one belongs to picture i of the other, and they are drawn together.
    """
    first = resamples(len(a), count, seed)
    second = first if paired else resamples(len(b), count, seed + 1)
    values = [distance(a[i], b[j]) for i, j in zip(first, second, strict=True)]
    return torch.tensor(values, dtype=torch.float64).std().item()


def of_mean(values: Tensor) -> float:
    """The standard deviation of the mean of (N,) over resamples, exactly: that of the values over the root of N."""
    return (values.double().var(correction=0) / len(values)).sqrt().item()
