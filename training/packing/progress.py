"""How far the work is, for who waits."""

from __future__ import annotations

import sys
import time

from training.messages import printable


def rate_text(count: float, seconds: float) -> str:
    """`count` in `seconds` as a rate, with three digits that count: slow work is no work of rate 0.0."""
    rate = count / max(1e-9, seconds)
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


class Progress:
    """One line on stderr, rewritten on a terminal, repeated every ten seconds elsewhere."""

    def __init__(self, total: int | None) -> None:
        self.total, self.start, self.live = total, time.monotonic(), sys.stderr.isatty()
        self.next = self.start + (0.2 if self.live else 10.0)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.start

    def show(self, pictures: int, skips: int) -> None:
        """Where the packing stands; cheap to call for every picture."""
        if not self._due():
            return
        total = f" of {self.total:,}" if self.total else ""
        left = max(0, self.total - pictures - skips) * self.seconds / pictures if self.total and pictures else 0
        eta = f", {left:,.0f} s left" if left else ""
        skipped = f", {skips:,} skipped" if skips else ""
        self._say(f"packing: {pictures:,}{total} pictures, {rate_text(pictures, self.seconds)}/s{eta}{skipped}")

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
