"""What a case of the suite declares: the sides that do the same work, which of them are timed, and what is aimed at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, ClassVar, Literal, NamedTuple

from training.errors import UserError

Setting = Literal["launched", "installed", "compiled"]
PEAK_GPU = 989e12  # FLOP/s of an H100 or H200 in dense bfloat16, by its data sheet


class Lane(NamedTuple):
    """What is timed by its name: a side of a case, in a process that is set up as `setting` says.

    "launched": with this project's allocator, as its scripts start; "installed": as Python starts, allocator untouched;
    "compiled": as launched, the networks compiled.
    """

    name: str
    side: str
    setting: Setting = "launched"


OURS = Lane("ours", "ours")
STOCK = Lane("peer, as installed", "peer", "installed")
SAME = Lane("peer, our allocator", "peer")
PRODUCT = Lane("matrix product", "product")
CPU_LANES = (OURS, STOCK, SAME, PRODUCT)
ON_GPU = (OURS, Lane("peer", "peer"), Lane("ours, compiled", "ours", "compiled"),
          Lane("peer, compiled", "peer", "compiled"), PRODUCT)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Target:
    """A number made of two lanes of the same round, and what it is to be.

    The quotient `over` / `under` of their seconds (or MiB), or with `minus` the difference. A speed-up is to be at
    least `least`, a cost at most `most`; with neither it is only told, a `share` in percent. `checked`: `--check` fails
    where it misses by a fifth; not of what depends on the machine.
    """

    name: str
    over: str
    under: str
    least: float | None = None
    most: float | None = None
    minus: bool = False
    share: bool = False
    checked: bool = True

    def values(self, lanes: Mapping[str, Sequence[float]]) -> list[float]:
        """The number in each round."""
        pairs = zip(lanes[self.over], lanes[self.under], strict=True)
        return [a - b if self.minus else a / b for a, b in pairs]

    def met(self, value: float, slack: float = 1.0) -> bool | None:
        """Whether `value` reaches `slack` of the target; None where there is none."""
        if self.least is not None:
            return value >= slack * self.least
        return None if self.most is None else value <= self.most / slack

    def told(self) -> str:
        """The target in words."""
        if self.least is not None:
            return f">= {self.least:.0%}" if self.share else f">= {self.least:g}x"
        return "" if self.most is None else f"<= {self.most:g}{' s' if self.minus else 'x'}"


NOT_YET = False  # `checked` of what misses its target by a fifth now or then, so that a check would fail by chance
STOCK_SPEED = Target(name="speed, as launched against as installed", over=STOCK.name, under=OURS.name)
SAME_SPEED = Target(name="speed, same allocator", over=SAME.name, under=OURS.name)
OF_PRODUCT = Target(name="of a matrix product's rate", over=PRODUCT.name, under=OURS.name, share=True, checked=False)
GPU_TARGETS = (
    Target(name="speed, both eager", over="peer", under="ours"),
    Target(name="speed, both compiled", over="peer, compiled", under="ours, compiled"),
    replace(OF_PRODUCT, name="of a matrix product's rate, compiled", under="ours, compiled"),
    replace(OF_PRODUCT, name="of 989 TFLOP/s (MFU), eager", over="989 TFLOP/s"),
    replace(OF_PRODUCT, name="of 989 TFLOP/s (MFU), compiled", over="989 TFLOP/s", under="ours, compiled"),
)

# Compiling takes the most of a run's time: what is short is timed eager alone.
EAGER, EAGER_TARGETS = (OURS, ON_GPU[1], PRODUCT), (GPU_TARGETS[0], GPU_TARGETS[3])


class Place(NamedTuple):
    """Where and how large a case is built."""

    device: str = "cpu"
    size: Literal["smoke", "cpu", "gpu"] = "cpu"
    setting: Setting = "launched"
    processor: bool = False  # processor time in place of the clock's
    threads: int = 0


@dataclass
class Contest:
    """A case as built in one process. `calls`: what each side does, `agree`: raises AssertionError unless all give the
    same. `items` of `unit` are one call's; `flops`: of one call of ours, 0 where a matrix product says nothing.
    `alone`: the calls give their own seconds. `facts`: further numbers, measured once, after the rounds."""

    calls: dict[str, Callable[[], Any]]
    agree: Callable[[], None]
    items: int = 1
    unit: str = "images"
    flops: float = 0.0
    alone: bool = False
    facts: dict[str, Callable[[], float]] = field(default_factory=dict)


class Case(ABC):
    """One comparison. `measure`: of a call, its "seconds" or its "peak" memory in MiB."""

    kind: ClassVar[str]
    title: ClassVar[str]
    measure: ClassVar[Literal["seconds", "peak"]] = "seconds"
    lanes: ClassVar[tuple[Lane, ...]] = CPU_LANES
    gpu_lanes: ClassVar[tuple[Lane, ...]] = ON_GPU
    targets: ClassVar[tuple[Target, ...]]
    gpu_targets: ClassVar[tuple[Target, ...]] = GPU_TARGETS
    rounds: ClassVar[int | None] = None  # of its own, in place of those asked for

    @abstractmethod
    def build(self, place: Place) -> Contest:
        """All sides, ready. Raises UserError where a peer is not installed."""

    def at(self, device: str) -> tuple[tuple[Lane, ...], tuple[Target, ...]]:
        """What is timed and told on a device."""
        return (self.gpu_lanes, self.gpu_targets) if device == "cuda" else (self.lanes, self.targets)


class Number(NamedTuple):
    """A target's number: the median over the rounds, and the round that speaks least for us."""

    target: Target
    value: float
    worst: float

    @classmethod
    def of(cls, target: Target, lanes: Mapping[str, Sequence[float]]) -> Number:
        """From the rounds of all lanes."""
        values = target.values(lanes)
        return cls(target, median(values), max(values) if target.most is not None else min(values))


def peers(name: str = "diffusers") -> Any:
    """The package that is compared with. Raises UserError where it is not installed."""
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise UserError(f"{name} is not installed", hint=f"pip install {name}") from None
