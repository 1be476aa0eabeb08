"""Faults on request, for tests and drills: LDM_FAULT=<point>[:n]=<action> at the n-th visit of a point."""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

from training.errors import UserError

POINTS = (
    "checkpoint.staging",  # the staging folder was made
    "checkpoint.file",  # one of its files was written
    "checkpoint.manifest",
    "checkpoint.rename",  # all is staged and synced, nothing is renamed
    "checkpoint.latest",  # renamed, not yet pointed to
    "checkpoint.prune",  # between two removals of old checkpoints
    "step",  # before the backward passes of a step
    "metrics",  # before lines are added to metrics.jsonl or timing.jsonl
    "shard",  # before a shard of latents is encoded
    "samples",  # before pictures are made
    "export",  # before final/ is written
)
SIGNALS = {name: signal.Signals[f"SIG{name.upper()}"] for name in ("kill", "term", "int", "hup", "usr1")}
ACTIONS = (*SIGNALS, "raise", "enospc")
visits: Counter[str] = Counter()  # of this process


def fault(point: str) -> None:
    """Do here what LDM_FAULT asks: a signal to this process, a RuntimeError, or a full disk's OSError.

    Raises UserError for an LDM_FAULT that names no known point or action: a drill that tests nothing is no drill.
    """
    request = os.environ.get("LDM_FAULT")
    if not request:
        return
    place, _, action = request.partition("=")
    name, _, number = place.partition(":")
    if name not in POINTS or action not in ACTIONS or not (number or "1").isdecimal():
        raise UserError(
            f"LDM_FAULT={request}: expected <point>[:n]=<action>",
            hint=f"points: {', '.join(POINTS)}; actions: {', '.join(ACTIONS)}",
        )
    if name != point:
        return
    visits[point] += 1
    if visits[point] != int(number or 1):
        return
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if action == "raise":
        raise RuntimeError(f"fault at {point}, as LDM_FAULT asks")
