"""What buckets cost of the pictures packed in them, counted and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from training.pictures.frames import Frame
from training.shards.index import Size

LITTLE = 0.005  # of a picture: what rounding of its sides may cut


class Framing:
    """How many pictures went to each bucket, and how much of them was cut."""

    def __init__(self) -> None:
        self.buckets = Counter[Size]()
        self.lost, self.most = 0.0, 0.0

    def cuts(self, frame: Frame) -> bool:
        """Take note of one picture; whether more of it is cut than rounding explains."""
        share = 1 - frame.kept
        self.buckets[frame.size] += 1
        self.lost, self.most = self.lost + share, max(self.most, share)
        return share > LITTLE

    def line(self, buckets: Sequence[Sequence[int]]) -> str:
        """What is told, of all buckets in their order."""
        counts = ", ".join(f"{self.buckets[size[0], size[1]]:,} of {size[0]}x{size[1]}" for size in buckets)
        lost = self.lost / max(1, self.buckets.total())
        return f"buckets (height x width): {counts}; cut {lost:.1%} of a picture on average, {self.most:.1%} at most"
