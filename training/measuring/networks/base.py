"""What every feature network offers, and what is said of it beside a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoencoder.images import as_rgb


@dataclass(frozen=True)
class Features:
    """uint8 pictures (B,C,H,W), as `as_rgb` shows them -> (B, dim), and the name that stands beside every number.

    `facts`: weights and preprocessing, for the protocol. `published`: measure -> the name under which that measure in
    this very network is known in the literature.
    """

    name: str
    dim: int
    extract: Callable[[Tensor], Tensor]
    facts: Mapping[str, str] = field(default_factory=dict)
    published: Mapping[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        return self.extract(as_rgb(pixels))

    def about(self) -> dict[str, str | int]:
        """The network as the protocol states it."""
        return {"name": self.name, "dim": self.dim, **self.facts}
