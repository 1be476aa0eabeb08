"""The books of a run: one ledger of what it did not use as it was given, over all its processes and resumptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from training.ledger import Ledger

if TYPE_CHECKING:
    from training.loop.stage import Stage
    from training.loop.watchdogs import Watchdogs

REPLACED = "samples that could not be read, another in the place of each"
SKIPPED = "steps skipped, their gradient a spike"
OVERFLOWED = "steps skipped, their gradient an overflow of fp16, after which the loss scale is lowered"


class Books:
    """What is known at the start is no part of its state: it is found again whenever the run goes on."""

    def __init__(self, stage: Stage, watchdogs: Watchdogs) -> None:
        self.stage, self.watchdogs = stage, watchdogs
        self.kept = Ledger()  # of all processes, up to the last save
        self.given = Ledger()  # settings without use here

    def gather(self) -> None:
        """Bring together what each process noted since the last time, the same in all. Collective."""
        from accelerate.utils import gather_object

        noted, bad = self._noted().report(), self._bad()
        parts = [(noted, dict(bad))]
        if self.watchdogs.accelerator.num_processes > 1:
            parts = gather_object(parts)
        for other, samples in parts:
            self.kept.merge(other)
            bad.update(samples)
        if self.stage.tally:
            self.stage.tally.noted = Ledger()

    def state(self) -> dict[str, Any]:
        """Plain state for checkpoints, as of the last `gather`."""
        return {"ledger": self.kept.report(), "bad": sorted(self._bad().items())}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.kept = Ledger()
        self.kept.merge(state.get("ledger", {}))  # not in checkpoints of earlier versions
        self._bad().clear()
        self._bad().update({int(index): str(why) for index, why in state.get("bad", [])})

    def ledger(self) -> Ledger:
        """All of it, as far as this process knows."""
        whole = Ledger()
        for part in (self.given, self.stage.tally.counted if self.stage.tally else None, self.kept, self._noted()):
            whole.merge(part.report() if part else {})
        for why in self._bad().values():
            whole.add("replaced", REPLACED, why[:120])
        whole.add("left out", SKIPPED, count=self.watchdogs.skipped)
        whole.add("left out", OVERFLOWED, count=self.watchdogs.overflows)
        return whole

    def _noted(self) -> Ledger:
        return self.stage.tally.noted if self.stage.tally else Ledger()

    def _bad(self) -> dict[int, str]:
        bad: dict[int, str] = getattr(self.stage.dataset, "bad", {})
        return bad
