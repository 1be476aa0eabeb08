"""Which noise is mixed with which data: each sample's own, or the noise of the batch that lies nearest.

Of the permutations of a batch's noise the pairing takes the one with the least sum of ||x0 - eps||^2, among samples of
one condition: noise chosen over all would tell the condition, and not be N(0, I) given it, which is where sampling
starts (Cheng & Schwing 2025, arXiv 2503.10636: a mean of .8 given a caption). A new pairing is a class and an entry in
`PAIRINGS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from autoencoder.precision import double
from ldm.conditioning import Cond


class Pairing(ABC):
    """A rule that hands the noise of a batch out to its data, independently of their conditions."""

    kind: str

    @abstractmethod
    def __call__(self, x0: Tensor, eps: Tensor, cond: Cond | Sequence[str] | None = None) -> Tensor:
        """The noise (B, ...) for each of x0 (B, ...), a permutation of eps (B, ...). `cond`: what the samples are
        conditioned on, encoded or as captions; None for nothing."""

    def pairs(self, cond: Cond | Sequence[str] | None, batch: int) -> bool:
        """Whether the rule has a choice among so many samples of these conditions, or needs none."""
        return True

    def labels(self, cond: Cond | Sequence[str] | None, batch: int) -> Cond | Sequence[str] | None:
        """What stands for these conditions in `pairs` and the call, made once: here they themselves, uncompared."""
        return cond


@dataclass(frozen=True, kw_only=True)
class Independent(Pairing):
    """Each sample keeps its own noise, so that a loss depends on its seed alone."""

    kind: Literal["independent"] = "independent"

    def __call__(self, x0: Tensor, eps: Tensor, cond: Cond | Sequence[str] | None = None) -> Tensor:
        return eps


@dataclass(frozen=True, kw_only=True)
class MinibatchOT(Pairing):
    """The permutation with the least total squared distance ||x0 - eps||^2 among samples of one condition: straighter
    paths, exactly optimal.

    Noise is still drawn by each sample's seed, but which sample gets it depends on the batch it is paired in: here the
    micro-batch of one process. At O(B^3) on the CPU, meant for a few hundred samples. Where no two samples of a batch
    have the same condition nothing is paired. ValueError where data or noise is not finite. Tong et al. 2024 (arXiv
    2302.00482), section 3.2; Pooladian et al. 2023 (arXiv 2304.14772).
    """

    kind: Literal["minibatch-ot"] = "minibatch-ot"

    def pairs(self, cond: Cond | Sequence[str] | None, batch: int) -> bool:
        """Whether two samples of the batch have the same condition."""
        return cond is None or batch < 2 or len(set(groups(cond, batch))) < batch

    def labels(self, cond: Cond | Sequence[str] | None, batch: int) -> Sequence[str] | None:
        """A text for each sample, equal where the conditions are: to compare encoded ones takes long."""
        return None if cond is None else [str(number) for number in groups(cond, batch)]

    def __call__(self, x0: Tensor, eps: Tensor, cond: Cond | Sequence[str] | None = None) -> Tensor:
        same = [0] * len(x0) if cond is None else groups(cond, len(x0))
        data, noise = (double(part.detach().flatten(1)).cpu() for part in (x0, eps))
        index = torch.arange(len(x0))
        for group in set(same):
            rows = torch.tensor([row for row, number in enumerate(same) if number == group])
            # The squares are the same for every permutation.
            index[rows] = rows[assignment(-2 * data[rows] @ noise[rows].T)]
        return eps[index.to(eps.device)]


def groups(cond: Cond | Sequence[str], batch: int) -> list[int]:
    """A number for each sample of a batch, equal where the conditions are equal in every part."""
    if not isinstance(cond, Cond):
        known: dict[str, int] = {}
        return [known.setdefault(caption, len(known)) for caption in cond]
    whole = cond.expand(batch)
    parts = [whole.context.masked_fill(~whole.mask[..., None], 0), whole.mask, *whole.extras.values()]
    parts += [] if whole.pooled is None else [whole.pooled]
    rows = torch.cat([double(part.detach().flatten(1)).cpu() for part in parts], dim=1)
    numbers: list[int] = torch.unique(rows, dim=0, return_inverse=True)[1].tolist()
    return numbers


def assignment(cost: Tensor) -> Tensor:
    """The column of each row in the cheapest one-to-one assignment of finite costs (n, n): (n,) int64.

    Shortest augmenting paths, with a price for each column that makes every step along a path cost at least 0: Jonker &
    Volgenant 1987; Crouse 2016, algorithm of section II. Raises ValueError for a cost that is not finite, along which
    no path would end.
    """
    cost = cost.double()
    if not cost.isfinite().all():
        raise ValueError("minibatch-ot cannot pair data and noise whose distances are not finite (NaN or infinity)")
    n, price = len(cost), torch.zeros(len(cost), dtype=torch.float64)
    column_of, row_of = [-1] * n, [-1] * n
    for start in range(n):
        least, before = torch.full((n,), torch.inf, dtype=torch.float64), torch.full((n,), -1)
        reached, row, length = torch.zeros(n, dtype=torch.bool), start, 0.0
        while row >= 0:  # until a column is reached that has no row
            through = length + cost[row] - price
            better = (through < least) & ~reached
            least, before = torch.where(better, through, least), torch.where(better, row, before)
            column = int(least.masked_fill(reached, torch.inf).argmin())
            reached[column], row = True, row_of[column]
            # From a column to its own row the way is minus what that row costs there.
            length = (least[column] - cost[row, column] + price[column]).item()
        price = torch.where(reached, price - least[column] + least, price)
        while row != start:  # back along the path: every column goes to the row it was reached from
            row = int(before[column])
            row_of[column], column_of[row], column = row, column, column_of[row]
    return torch.tensor(column_of)


PAIRINGS = (Independent, MinibatchOT)
