"""Masks: some pixels are seen, the others are 0 in y, which keeps the picture's size."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.inverse.operators.base import Operator, shape_of
from ldm.inverse.operators.spectral import Factors, Spectral
from ldm.noise import Noise


class Masking(Spectral):
    """y = seen * x, each pixel with all its channels; A = A^T = A^+."""

    @abstractmethod
    def seen(self, height: int, width: int) -> Tensor:
        """True where a pixel is seen, (H, W). Raises ValueError for a size that does not fit."""

    def factors(self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Factors:
        return Factors(self.seen(*shape[1:]).to(device, dtype), *[_same] * 4)


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, kw_only=True)
class Mask(Masking):
    """Each pixel is seen with probability `share`, and none in the box of `box` times the sides in the centre.

    Which ones is a matter of the settings and the picture's size alone, the same for every picture of a batch.
    """

    kind: Literal["mask"] = "mask"
    share: float = 0.5
    box: float = 0.0
    seed: int = 0
    limits: ClassVar = {"share": "[0, 1]", "box": "[0, 1]"}

    def seen(self, height: int, width: int) -> Tensor:
        drawn = Noise.from_seeds([self.seed]).uniform((height, width), "mask")[0] < self.share
        rows, columns = (((torch.arange(side) + 0.5) / side - 0.5).abs() < self.box / 2 for side in (height, width))
        return drawn & ~(rows[:, None] & columns)

    def domain(self, y: Tensor) -> tuple[int, int, int]:
        return shape_of(y)


@dataclass(frozen=True, eq=False)
class GivenMask(Masking):
    """The pixels of a mask (H, W) that holds 1 or True where a pixel is seen, else 0. Raises ValueError for another."""

    given: Tensor
    kind: Literal["mask"] = "mask"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.given.ndim != 2 or not bool(((self.given == 0) | (self.given == 1)).all()):
            raise ValueError(f"a mask must be (H, W) of 0 (unseen) and 1 (seen), got shape {tuple(self.given.shape)}: "
                             "compare a grey picture with a threshold first")

    def seen(self, height: int, width: int) -> Tensor:
        if self.given.shape != (height, width):
            high, wide = self.given.shape
            raise ValueError(f"the mask is {wide} x {high} and the picture {width} x {height} pixels: "
                             "give a mask of the picture's size")
        return self.given

    def domain(self, y: Tensor) -> tuple[int, int, int]:
        shape = shape_of(y)
        self.seen(*shape[1:])
        return shape


def measure(operator: Operator, x: Tensor, sigma_y: float, noise: Noise) -> Tensor:
    """y = A x + sigma_y n, n of each sample's seed; what a mask does not see stays 0, as it is in every y of one."""
    y = operator(x)
    y = y + sigma_y * noise.normal(y.shape[1:], "measurement", dtype=y.dtype)
    return operator(y) if isinstance(operator, Masking) else y


def residual(operator: Operator, x: Tensor, y: Tensor) -> Tensor:
    """Root mean square of y - A x over what was measured, (B,): sigma_y, up to chance, for the x that y was made of."""
    off = (y - operator(x)).flatten(1)
    count = operator(torch.ones_like(x)).flatten(1).sum(1) if isinstance(operator, Masking) else off.shape[1]
    return (off.square().sum(1) / count).sqrt()


OPERATORS = (Mask,)
