"""A weighting that is learned: how large the loss is at each noise level, in the optimiser and in the checkpoint."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.schedules import NoiseSchedule


class Weighed(NamedTuple):
    """What a network with an `Uncertainty` beside it answers: its prediction, and u (B,) for the loss."""

    prediction: Tensor
    log_var: Tensor


class Uncertainty(nn.Module):
    """u(noise level) of the loss  weight * error * exp(-u) + u, least where exp(u) is the mean weighted error.

    A cosine series of `terms` terms over the schedule's range of noise levels, from 0: at first the loss is as it would
    be without. Karras et al. 2024 (arXiv 2312.02696), eq. 14 and 15; Kendall et al. 2018 (arXiv 1705.07115).
    """

    low: Tensor
    span: Tensor

    def __init__(self, schedule: NoiseSchedule, terms: int = 32) -> None:
        super().__init__()
        ends = schedule.noise_level(torch.tensor([max(schedule.t_min, 1e-5), 1.0], dtype=torch.float64))
        self.register_buffer("low", ends[0].float(), persistent=False)
        self.register_buffer("span", (ends[1] - ends[0]).float(), persistent=False)
        self.series = nn.Parameter(torch.zeros(terms))

    def forward(self, noise_level: Tensor) -> Tensor:
        """u (B,) float32 at noise levels (B,), as the schedule shows them to a network."""
        place = (noise_level.float() - self.low) / self.span
        order = torch.arange(len(self.series), device=place.device)
        return torch.cos(math.pi * place[:, None] * order).float() @ self.series.float()
