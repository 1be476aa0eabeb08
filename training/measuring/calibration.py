"""Whether draws of a posterior spread as they should: how often their central intervals hold the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoencoder.precision import double

LEVELS = tuple(number / 10 for number in range(1, 10))  # of the reliability curve
TOLD = (0.5, 0.9)  # of the levels, in tables
EXACT = 19  # draws from which on no interval of these levels is wider than the draws: (EXACT + 1) (1 - 0.9) = 2
GREY_LEVEL = 1.0  # standard deviation of 8-bit values up to which one counts as settled


def coverage(truth: Tensor, draws: Tensor, levels: Sequence[float]) -> Tensor:
    """How far the central interval of each level holds the truth (B, ...), of draws (B, N, ...): (L, B, ...) in [0, 1].

    Of N + 1 draws of one distribution each is equally likely to be the r-th. So the truth, with b draws below it and e
    equal to it, stands for the levels from b / (N + 1) to (b + e + 1) / (N + 1) of the distribution, and what is given
    is the share of these that lies in ((1 - level) / 2, (1 + level) / 2). Its mean is the level for every calibrated
    posterior, every N and values of any kind, 8-bit ones too. For N + 1 a multiple of 2 / (1 - level) and no ties it is
    0 or 1: whether the truth lies between two of the draws; of fewer draws a truth beyond all counts in part (`floor`).
    """
    count = draws.shape[1] + 1
    low = double((draws < truth[:, None]).sum(1)) / count
    width = (double((draws == truth[:, None]).sum(1)) + 1) / count
    inside = [(low + width).clamp(max=(1 + level) / 2) - low.clamp(min=(1 - level) / 2) for level in levels]
    return torch.stack(inside).clamp(min=0) / width


def floor(draws: int, level: float) -> float:
    """The coverage of the level that a truth beyond all of so many draws is counted as."""
    return max(0.0, 1 - (1 - level) / 2 * (draws + 1))


class Calibration:
    """Coverage of 8-bit pictures by their draws, picture by picture.

    A value is settled where it and its draws together have a standard deviation of at most `GREY_LEVEL`: a background
    that all of them agree on says nothing. That rule does not tell the truth from a draw, so what is left of a
    calibrated posterior is calibrated too; coverage with the settled ones is told beside.
    """

    def __init__(self) -> None:
        self.rows: list[Tensor] = []  # (B, 2, 1 + L): of all values and of those not settled, number and sums

    def add(self, truth: Tensor, draws: Tensor) -> None:
        """uint8 (B, C, H, W) and (B, N, C, H, W)."""
        open_ = double(torch.cat([truth[:, None], draws], dim=1)).std(1) > GREY_LEVEL
        held = coverage(truth, draws, LEVELS)
        weights = double(torch.stack([torch.ones_like(open_), open_]))  # (2, B, ...)
        sums = [weights, *(weights * one for one in held)]
        self.rows.append(torch.stack([part.flatten(2).sum(2) for part in sums], dim=-1).movedim(0, 1).cpu())

    def numbers(self) -> dict[str, Any]:
        """Coverage of each level over all values of all pictures that are not settled, with its standard error over
        pictures, whose values depend on each other; over all values; and the share of those that are not settled."""
        every, unsettled = torch.cat(self.rows).unbind(1)
        count, held = unsettled[:, :1], unsettled[:, 1:]
        mean = held.sum(0) / count.sum()
        error = (held - mean * count).square().sum(0).sqrt() / count.sum()
        whole = every[:, 1:].sum(0) / every[:, :1].sum()
        numbers: dict[str, Any] = {"unsettled": (count.sum() / every[:, :1].sum()).item()}
        for at, level in enumerate(LEVELS):
            if level in TOLD:
                name = f"coverage_{100 * level:.0f}"
                numbers |= {name: mean[at].item(), f"{name}_error": error[at].item(), f"{name}_all": whole[at].item()}
        return numbers | {"reliability": [list(pair) for pair in zip(LEVELS, mean.tolist(), strict=True)]}
