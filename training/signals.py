"""Signals as wishes: noted when they come, granted at the next step boundary."""

from __future__ import annotations

import signal
from types import FrameType


class Signals:
    """SIGTERM and SIGINT ask for a save and a stop, SIGUSR1 for a save; a second SIGINT leaves at once."""

    def __init__(self) -> None:
        self.stop, self.save = 0, False

    def listen(self) -> None:
        """Take the three signals of this process over, for its life."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGUSR1, self._save)

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self.save = self.save, False
        return asked

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if self.stop == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = number

    def _save(self, _number: int, _frame: FrameType | None) -> None:
        self.save = True
