"""The parameters that a training holds: how many learn, how many only answer, part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from training.loop.stage import Stage

Modules = Mapping[str, nn.Module]
OTHERS = "others"


def split(stage: Stage, held: Modules) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those that learn in a stage, and all others that it or its job has, of which `held` are the modules."""
    networks = (p for network in stage.networks.values() for p in network.parameters())
    learning = {id(p): p for p in networks if p.requires_grad}
    every = {id(p): p for _, module in _parts(stage, held) for p in module.parameters()}
    return [*learning.values()], [p for name, p in every.items() if name not in learning]


def counts(stage: Stage, held: Modules) -> dict[str, Any]:
    """How many of each, in all and by part: the parts of its networks, then what it calls besides."""
    learning, frozen = split(stage, held)
    left = {id(p): (p.numel(), 0) for p in learning} | {id(p): (0, p.numel()) for p in frozen}
    trainable, still = (sum(part) for part in zip((0, 0), *left.values(), strict=True))
    parts: dict[str, list[int]] = {}
    for name, module in _parts(stage, held):
        own = [left.pop(id(p)) for p in module.parameters() if id(p) in left]
        if own:
            parts[name] = [sum(part) for part in zip(*own, strict=True)]
    return {"trainable": trainable, "frozen": still, "parts": parts}


def _parts(stage: Stage, held: Modules) -> Iterator[tuple[str, nn.Module]]:
    for name, network in stage.networks.items():
        yield from ((f"{name}.{part}", module) for part, module in network.named_children())
        yield name, network
    yield from ((n, m) for n, m in vars(stage).items() if isinstance(m, nn.Module))
    yield from held.items()
    yield OTHERS, nn.ModuleList(stage.frozen)
