"""Gradient checkpointing (Chen et al. 2016): what the backward pass computes again, so that it need not be kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run(layer: Callable[..., Any], saving: bool, *inputs: Tensor | tuple[Any, ...] | None) -> Tensor:
    """layer(*inputs); with `saving` the backward pass computes what is inside again, so that it need not be kept."""
    again = saving and torch.is_grad_enabled()
    y: Tensor = checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs)
    return y


class Block(nn.Module):
    """A part of a network that, while it is `saving`, keeps its input alone for the backward pass."""

    saving = False

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> what `compute` makes of it."""
        return run(self.compute, self.saving, x)

    def compute(self, x: Tensor) -> Tensor:
        """What the part is, free of side effects: it may be computed twice."""
        raise NotImplementedError


def save_memory(network: nn.Module, saving: bool) -> None:
    """Have each `Block` inside `network` keep its input alone, or all it computes."""
    for part in network.modules():
        if isinstance(part, Block):
            part.saving = saving
