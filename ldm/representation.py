"""What is asked of a denoiser's features while it is trained, beside its loss: to differ from sample to sample, or to
agree with a frozen vision model's. Nothing of it is needed to draw."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.backbones.base import Backbone
from ldm.checks import Checked
from ldm.uncertainty import Weighed

VISION = "vision"  # the extra (B, features, h, w) of a vision model, on any grid over the picture

Representation = Callable[[Tensor, Sequence[int], Mapping[str, Tensor]], Tensor]
"""Features (B, N, D) of latents of a size (h, w), and the extras of their condition -> what they cost, (B,) float32."""


class Represented(NamedTuple):
    """What a network answers whose features are compared: its answer, and their weighted cost (B,)."""

    answer: Tensor | Weighed
    cost: Tensor


class RepresentationConfig(Checked, ABC):
    """A frozen dataclass with a `kind`: `weight` times its cost is added to the loss, of the feature at the share
    `depth` of the backbone; with weight 0 it is none."""

    weight: float = 0.0
    depth: float = 1.0
    group: int = 1  # consecutive samples that are held against each other: every micro-batch is a multiple of it

    @property
    def reads(self) -> bool:
        """Whether it reads the extra `VISION`."""
        return False

    def build(self, backbone: Backbone, features: int) -> Representation | None:
        """The cost, a module where it learns; None for none. `features`: the channels of the extra `VISION`. Raises
        ValueError where the backbone gives no such feature."""
        return self.of(backbone.tap_width(self.depth), features) if self.weight else None

    @abstractmethod
    def of(self, width: int, features: int) -> Representation:
        """The cost of features of this width."""


@dataclass(frozen=True, kw_only=True)
class NoRepresentation(RepresentationConfig):
    """Config of a training by the loss of its answers alone."""

    kind: Literal["none"] = "none"

    def of(self, width: int, features: int) -> Representation:
        raise AssertionError("its weight is 0")


@dataclass(frozen=True, kw_only=True)
class Dispersive(RepresentationConfig):
    """Config of features that are to lie apart: `dispersion` of those of a `group` of consecutive samples, all tokens
    of a sample one vector (Wang and He 2025, arXiv 2506.09027)."""

    kind: Literal["dispersive"] = "dispersive"
    weight: float = 0.5
    depth: float = 0.25
    tau: float = 0.5
    group: int = 8
    limits: ClassVar = {"weight": "[0, inf)", "depth": "(0, 1]", "tau": "(0, inf)", "group": "[2, inf)"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group & (self.group - 1):
            raise ValueError(f"group: must be a power of two, which batches can be split by, got {self.group}")

    def of(self, width: int, features: int) -> Representation:
        return self

    def __call__(self, tokens: Tensor, size: Sequence[int], extras: Mapping[str, Tensor]) -> Tensor:
        """See `Representation`: each sample's is that of its group."""
        groups = tokens.reshape(-1, self.group, tokens[0].numel())
        return dispersion(groups, self.tau).repeat_interleave(self.group)


def dispersion(z: Tensor, tau: float) -> Tensor:
    """log mean_ij exp(-|z_i - z_j|^2 / (D tau)) of z (..., G, D), the pairs i = j among them: (...,) float32. Where all
    are equal it is 0, elsewhere less."""
    with torch.autocast(z.device.type, enabled=False):
        z = z.float() - z.float().mean(-2, keepdim=True)  # so that little cancels below
        inner = z @ z.mT
        square = inner.diagonal(dim1=-2, dim2=-1)
        apart = square[..., None] + square[..., None, :] - 2 * inner
        total: Tensor = (-apart / (z.shape[-1] * tau)).logsumexp((-2, -1)) - 2 * math.log(z.shape[-2])
    return total


@dataclass(frozen=True, kw_only=True)
class Repa(RepresentationConfig):
    """Config of features that are to agree with a vision model's of the clean picture: see `Aligned`; its head has
    layers of `hidden` (REPA: Yu et al. 2024, arXiv 2410.06940)."""

    kind: Literal["repa"] = "repa"
    weight: float = 0.5
    depth: float = 1 / 3
    hidden: int = 2048
    limits: ClassVar = {"weight": "[0, inf)", "depth": "(0, 1]", "hidden": "(0, inf)"}

    @property
    def reads(self) -> bool:
        return self.weight > 0

    def of(self, width: int, features: int) -> Representation:
        return Aligned(width, self.hidden, features)


class Aligned(nn.Module):
    """-mean_n cos(h(z_n), f_n) over places n, (B,): h an MLP of three layers, learned along and not needed to draw, f
    the extra `VISION`, resized to the grid of z bilinearly."""

    def __init__(self, width: int, hidden: int, features: int) -> None:
        super().__init__()
        layers = nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, features)
        self.head = nn.Sequential(*layers)

    def forward(self, tokens: Tensor, size: Sequence[int], extras: Mapping[str, Tensor]) -> Tensor:
        """See `Representation`."""
        stride = math.isqrt(math.prod(size) // tokens.shape[1])
        grid, aim = [side // stride for side in size], extras[VISION].float()
        if list(aim.shape[2:]) != grid:
            aim = F.interpolate(aim, grid, mode="bilinear", antialias=True)
        return -F.cosine_similarity(self.head(tokens).float(), aim.flatten(2).transpose(1, 2), dim=2).mean(1)


REPRESENTATIONS = (NoRepresentation, Dispersive, Repa)
