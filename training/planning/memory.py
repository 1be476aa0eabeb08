"""Memory of a training step by part, and what other micro-batches would take: predicted from two small ones.

A step runs the same operations whatever its micro-batch, so what is alive after operation t is a(t) + b(t) m bytes for
m samples. Both are found from two steps. The peak at any m is the largest of these lines, wherever in the step that is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from training.loop.stage import Stage


class Timeline(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that operations have made on a device and something still refers to, after each operation (`line`).

    Not what a kernel takes and gives back within one operation.
    """

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.held, self.line = device, 0, list[int]()
        self.alive: dict[int, tuple[Any, int, int]] = {}  # id of a storage -> its end, bytes, the operation it is of

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {id(tensor.untyped_storage()) for tensor in _tensors((*args, *kwargs.values()))}
        for tensor in _tensors(result if isinstance(result, list | tuple) else [result]):
            storage = tensor.untyped_storage()
            if tensor.device.type == self.device and id(storage) not in given and id(storage) not in self.alive:
                end = weakref.ref(storage, partial(self._ended, id(storage)))
                self.alive[id(storage)] = end, storage.nbytes(), len(self.line)
                self.held += storage.nbytes()
        self.line.append(self.held)
        return result

    def _ended(self, name: int, _end: object) -> None:
        self.held -= self.alive.pop(name)[1]


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    parts = (part for value in values for part in (value if isinstance(value, list | tuple) else [value]))
    return (part for part in parts if isinstance(part, Tensor))


def born(stage: Stage, timeline: Timeline) -> Iterator[tuple[int, int]]:
    """Of each gradient that a stage's networks hold, the operation that it is of, and its bytes."""
    for network in stage.networks.values():
        for p in network.parameters():
            if p.grad is not None and (found := timeline.alive.get(id(p.grad.untyped_storage()))):
                yield found[2], found[1]


class Seen(NamedTuple):
    """A step with `micro` samples a pass: bytes alive after each operation; of each gradient, since which operation,
    and bytes; the most that the allocator gave at once, kernels' own included."""

    micro: int
    line: list[int]
    births: list[tuple[int, int]]
    highest: int


class Peak(NamedTuple):
    """What a step has at its highest, bytes beyond what is there between two steps."""

    gradients: int
    activations: int
    kernels: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def predicted(small: Seen, large: Seen, micro: int) -> Peak:
    """The peak of a step with `micro` samples a pass, from those of two others."""
    share = (micro - small.micro) / (large.micro - small.micro)

    def between(a: Any, b: Any) -> Any:
        return a + share * (b - a)

    if len(small.line) == len(large.line):
        line = between(np.array(small.line, np.float64), np.array(large.line, np.float64))
        top = int(line.argmax())
        most, gradients = line[top], sum(size for since, size in large.births if since <= top)
    else:  # other operations for another number of samples: of the peaks alone
        most, gradients = between(max(small.line), max(large.line)), sum(size for _, size in large.births)
    kernels = between(*(seen.highest - max(seen.line) for seen in (small, large)))
    return Peak(gradients, max(0, round(most) - gradients), max(0, round(kernels)))


@dataclass(frozen=True)
class Observed:
    """Two steps of a training with gradient checkpointing on or off, `once` one pass each, or `again` after another;
    and bytes that are there between two steps."""

    saving: bool
    once: tuple[Seen, Seen]
    again: tuple[Seen, Seen]
    held: int

    def peak(self, micro: int, accumulation: int) -> Peak:
        """Of a step of such a split."""
        return predicted(*(self.once if accumulation == 1 else self.again), micro)

    def total(self, micro: int, accumulation: int) -> int:
        """Bytes in all."""
        return self.held + self.peak(micro, accumulation).total


def sizes(share: int, group: int, own: int) -> list[int]:
    """The micro-batches to choose from: powers of two times `group` that divide what a process has of a batch, all of
    it, and the config's own."""
    powers = (group << n for n in range(share.bit_length()))
    return sorted({size for size in powers if share % size == 0} | {share, own})
