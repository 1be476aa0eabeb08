"""Which noise is mixed with which data: each sample's own, or the noise of the batch that lies nearest.

A new pairing is a class and an entry in `PAIRINGS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


class Pairing(ABC):
    """A rule that hands the noise of a batch out to its data. It sees no conditions, which stay with their data."""

    kind: str

    @abstractmethod
    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The noise (B, ...) for each of x0 (B, ...), a permutation of eps (B, ...)."""


@dataclass(frozen=True, kw_only=True)
class Independent(Pairing):
    """Each sample keeps its own noise, so that a loss depends on its seed alone."""

    kind: Literal["independent"] = "independent"

    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        return eps


@dataclass(frozen=True, kw_only=True)
class MinibatchOT(Pairing):
    """The permutation with the least total squared distance ||x0 - eps||^2: straighter paths, exactly optimal.

    Noise is still drawn by each sample's seed, but which sample gets it depends on the batch it is paired in: here the
    micro-batch of one process. At O(B^3) on the CPU, meant for a few hundred samples. Tong et al. 2024 (arXiv
    2302.00482), section 3.2; Pooladian et al. 2023 (arXiv 2304.14772).
    """

    kind: Literal["minibatch-ot"] = "minibatch-ot"

    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        return eps[optimal(x0, eps).to(eps.device)]


def optimal(x0: Tensor, eps: Tensor) -> Tensor:
    """For each x0 the index of its noise, (B,) int64 on the CPU."""
    data, noise = (part.detach().flatten(1).to("cpu", torch.float64) for part in (x0, eps))
    # The squares are the same for every permutation.
    return assignment(-2 * data @ noise.T)


def assignment(cost: Tensor) -> Tensor:
    """The column of each row in the cheapest one-to-one assignment of finite costs (n, n): (n,) int64.

    Shortest augmenting paths with dual prices: Jonker & Volgenant 1987; Crouse 2016, algorithm of section II.
    """
    cost = cost.double()
    n = len(cost)
    row_price, column_price = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    column_of, row_of = [-1] * n, [-1] * n
    for start in range(n):
        least = torch.full((n,), torch.inf, dtype=torch.float64)
        before, reached = torch.full((n,), -1), torch.zeros(n, dtype=torch.bool)
        rows, row, length, column = [start], start, 0.0, -1
        while True:
            through = length + cost[row] - row_price[row] - column_price
            better = (through < least) & ~reached
            least, before = torch.where(better, through, least), torch.where(better, row, before)
            column = int(least.masked_fill(reached, torch.inf).argmin())
            length, reached[column] = least[column].item(), True
            if row_of[column] < 0:
                break
            row = row_of[column]
            rows.append(row)
        row_price[start] += length
        for other in rows[1:]:
            row_price[other] += length - least[column_of[other]]
        column_price = torch.where(reached, column_price - length + least, column_price)
        while True:
            row = int(before[column])
            row_of[column] = row
            column_of[row], column = column, column_of[row]
            if row == start:
                break
    return torch.tensor(column_of)


PAIRINGS = (Independent, MinibatchOT)
