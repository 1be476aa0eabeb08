"""How far a piece of work is, for who waits: `packing: 1,200 of 20,000 pictures, 310 pictures/s, 1 min left`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from training.messages import clear, duration, per_second, rewrites, show, tell

PAUSE = 10.0  # seconds between lines, where each stays
FLICKER = 0.2  # seconds between lines that are written over

Item = TypeVar("Item")


class Progress:
    """One line that is written over on a terminal, and elsewhere, as in a log, a line after every `pause` seconds.

    Cheap to ask for every sample. Work that is shorter than the first pause says nothing.
    """

    def __init__(
        self, doing: str, total: int | None = None, thing: str = "picture", *, pause: float = PAUSE, aloud: bool = True
    ) -> None:
        """Of several processes one alone is to be `aloud`."""
        self.doing, self.total, self.thing, self.done, self.free = doing, total, thing, 0.0, 0.0
        self.live = rewrites()
        self.start, self.pause = time.monotonic(), FLICKER if self.live else pause
        self.next = self.start + self.pause if aloud else math.inf

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        clear()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.start

    def rate(self) -> str:
        """Of what was done since, for people."""
        return per_second((self.done - self.free) / max(1e-9, self.seconds), self.thing)

    def add(self, count: int = 1, more: str = "") -> None:
        """`count` more are done."""
        self.at(self.done + count, more)

    def skip(self, count: int) -> None:
        """`count` more are done, and were before: they took no time."""
        self.done, self.free = self.done + count, self.free + count

    def at(self, done: float, more: str = "") -> None:
        """So many are `done` in all, a part of one among them; `more` stands at the end of the line."""
        self.done = done
        if (now := time.monotonic()) >= self.next:
            self.next = now + self.pause
            (show if self.live else tell)(self.line(more))

    def each(self, items: Iterable[Item], size: Callable[[Any], int] = len) -> Iterator[Item]:
        """The items, each of `size` things that are done once the next one is asked for."""
        with self:
            for item in items:
                yield item
                self.add(size(item))

    def by_steps(self, count: int, steps: int) -> Callable[[Any], None]:
        """What a sampler calls after each of its `steps`, in which `count` more get done."""
        before = self.done
        return lambda shot: self.at(before + count * min(1.0, (shot.step + 1) / steps))

    def line(self, more: str = "") -> str:
        """What is said of it."""
        of = f" of {self.total:,}" if self.total else ""
        new = self.done - self.free
        parts = [f"{self.doing}: {int(self.done):,}{of} {self.thing}{'s' * ((self.total or self.done) != 1)}"]
        if new > 0:
            parts.append(self.rate())
            left = (self.total or 0) - self.done
            parts += [f"{duration(left * self.seconds / new)} left"] if left > 0 else []
        return ", ".join([*parts, *([more] if more else [])])

    def told(self) -> None:
        """Another line has just said how far it is."""
        self.next = time.monotonic() + self.pause
