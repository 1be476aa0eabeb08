"""How far the work is, for who waits."""

from __future__ import annotations

import sys
import time

from training.messages import per_second, printable


class Progress:
    """One line on stderr, rewritten on a terminal, repeated every ten seconds elsewhere."""

    def __init__(self, total: int | None) -> None:
        self.total, self.start, self.live = total, time.monotonic(), sys.stderr.isatty()
        self.next = self.start + (0.2 if self.live else 10.0)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.start

    def rate(self, pictures: int) -> str:
        """Of what was done since, for people."""
        return per_second(pictures / max(1e-9, self.seconds), "picture")

    def show(self, pictures: int, skips: int) -> None:
        """Where the packing stands; cheap to call for every picture."""
        if not self._due():
            return
        total = f" of {self.total:,}" if self.total else ""
        left = max(0, self.total - pictures - skips) * self.seconds / pictures if self.total and pictures else 0
        eta = f", {left:,.0f} s left" if left else ""
        skipped = f", {skips:,} skipped" if skips else ""
        self._say(f"packing: {pictures:,}{total} pictures, {self.rate(pictures)}{eta}{skipped}")

    def show_mixing(self, written: int, total: int) -> None:
        """Where the writing of mixed shards stands."""
        if self._due():
            self._say(f"writing shards: {written:,} of {total:,} samples")

    def _due(self) -> bool:
        now = time.monotonic()
        if now < self.next:
            return False
        self.next = now + (0.2 if self.live else 10.0)
        return True

    def _say(self, line: str) -> None:
        sys.stderr.write(f"\r{printable(line)}\x1b[K" if self.live else f"{printable(line)}\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Frees the line for what comes next."""
        if self.live:
            sys.stderr.write("\r\x1b[K")
