"""The parameters that a training holds: how many learn, how many only answer, part by part."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from training.loop.stage import Stage

OTHERS = "others"


def parameters() -> list[nn.Parameter]:
    """All that this process holds at the moment, wherever they are kept."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Parameter)]


def split(stage: Stage, before: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those that learn in a stage, and all that came with it, since what there was `before`, and does not."""
    networks = (p for network in stage.networks.values() for p in network.parameters())
    learning = list({id(p): p for p in networks if p.requires_grad}.values())
    known = {id(p) for p in (*before, *learning)}
    return learning, [p for p in parameters() if id(p) not in known]


def counts(stage: Stage, before: Iterable[nn.Parameter]) -> dict[str, Any]:
    """How many of each, in all and by part: the parts of its networks, then what it calls besides."""
    learning, frozen = split(stage, before)
    left = {id(p): (p.numel(), 0) for p in learning} | {id(p): (0, p.numel()) for p in frozen}
    trainable, still = (sum(part) for part in zip((0, 0), *left.values(), strict=True))
    parts: dict[str, list[int]] = {}
    for name, module in _parts(stage):
        own = [left.pop(id(p)) for p in module.parameters() if id(p) in left]
        if own:
            parts[name] = [sum(part) for part in zip(*own, strict=True)]
    if left:
        parts[OTHERS] = [sum(part) for part in zip(*left.values(), strict=True)]
    return {"trainable": trainable, "frozen": still, "parts": parts}


def _parts(stage: Stage) -> Iterator[tuple[str, nn.Module]]:
    for name, network in stage.networks.items():
        yield from ((f"{name}.{part}", module) for part, module in network.named_children())
        yield name, network
    for thing in (stage, getattr(stage, "pipeline", None)):
        yield from ((n, m) for n, m in getattr(thing, "__dict__", {}).items() if isinstance(m, nn.Module))
