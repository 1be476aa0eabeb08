"""KID and CMMD of two sets of features as they are, without resamples."""

from __future__ import annotations

import torch
from torch import Tensor

from training.measuring.kernels import Cubic, Gaussian, Kernel, Sums, biased, sums, unbiased


def kernel_distance(a: Tensor, b: Tensor) -> float:
    return float(unbiased(*_all(Cubic(), a, b))[0])


def clip_mmd(a: Tensor, b: Tensor) -> float:
    return 1000 * float(biased(*_all(Gaussian(), a, b))[0])


def _all(kernel: Kernel, a: Tensor, b: Tensor) -> tuple[Sums, Tensor, Tensor]:
    ones = torch.ones(1, len(a), dtype=torch.float64), torch.ones(1, len(b), dtype=torch.float64)
    return sums(kernel, a, b, *ones), *ones
