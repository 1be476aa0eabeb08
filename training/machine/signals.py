"""SIGTERM, SIGINT, SIGHUP and SIGUSR1 of a training: noted when they come, acted on at the end of the step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from threading import Thread
from types import FrameType

GIVE_UP = 100  # stands, where the number of a signal is expected, for loader processes that die again and again
LOOK_EVERY = 2.0  # seconds after which a loader sees that its main process is gone


class Stopped(KeyboardInterrupt):
    """A signal that ends the program where it stands: there is nothing more to save."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """SIGTERM, SIGINT and SIGHUP ask for a save and a stop, SIGUSR1 for a save; a second SIGINT leaves at once."""

    def __init__(self) -> None:
        self.stop, self.save, self.saved = 0, False, False

    def listen(self) -> None:
        """Take the signals of this process over, for its life; a SIGHUP that nohup has it ignore stays ignored."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._stop)
        signal.signal(signal.SIGUSR1, self._save)

    def all_saved(self, *, main: bool) -> None:
        """From here on a stop is granted at once; one that came since it was last asked for, now. Raises Stopped.

        A process that is not the `main` one only waits, in a call where no handler of ours would run.
        """
        self.saved = True
        if self.stop:
            raise Stopped(self.stop)
        for number in () if main else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)

    def give_up(self) -> None:
        """Ask for a save and a stop, as no signal did: what reads the data cannot go on."""
        self.stop = self.stop or GIVE_UP

    def take_save(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self.save = self.save, False
        return asked

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if self.saved:
            raise Stopped(number)
        if self.stop == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = number

    def _save(self, _number: int, _frame: FrameType | None) -> None:
        self.save = True


def shield(_worker: int) -> None:
    """In a loader process: torchrun, batch systems and terminals send their signals to all processes of a training, of
    which the main one alone shall stop and save. A loader ends when that one says so, or is gone, wherever it is: one
    whose answers nobody reads any more would wait for ever to hand them over."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # which macOS lacks: there a SIGTERM to the group still ends the loaders
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_until_told, daemon=True).start()


@contextmanager
def block_sigterm() -> Iterator[None]:
    """Around the start of loader processes: they are born with SIGTERM blocked, and `shield` comes in time."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if hasattr(signal, "sigtimedwait") else set())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _until_told() -> None:
    main = parent_process()
    while main and os.getppid() == main.pid:
        told = signal.sigtimedwait({signal.SIGTERM}, LOOK_EVERY)
        if told and told.si_pid == main.pid:
            break
    os._exit(0)
