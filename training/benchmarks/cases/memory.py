"""Peak memory of the training steps that are timed: what a call has beyond weights, moments and averages, which are of
the same size on both sides; on a CPU by torch's profiler, on a GPU by its allocator."""

from __future__ import annotations

from dataclasses import dataclass

from training.benchmarks.case import OURS, SAME, Case, Contest, Place, Target
from training.benchmarks.cases import autoencoders, denoisers

MEMORY = Target(name="peak memory of a step, of the peer's", over=OURS.name, under=SAME.name, most=0.9)


@dataclass(frozen=True)
class Memory(Case):
    """Of the step of another case."""

    of: Case
    kind: str  # type: ignore[misc]
    title: str  # type: ignore[misc]
    measure = "peak"
    lanes = gpu_lanes = (OURS, SAME)
    targets = gpu_targets = (MEMORY,)
    rounds = 1  # it is the same each time

    def build(self, place: Place) -> Contest:
        return self.of.build(place)


def memory(of: Case) -> Memory:
    """The case of a step's memory."""
    return Memory(of, f"memory-{of.kind}", f"peak memory, {of.title}")


CASES = (memory(denoisers.DiTStep()), memory(denoisers.UNetStep()), memory(autoencoders.Step()))
