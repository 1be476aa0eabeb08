"""`generate.py` from its launch to a drawn picture, beside importing torch: processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from training.benchmarks.case import Case, Contest, Lane, Place, Target
from training.errors import UserError

DRAWN, IMPORTED = Lane("generate.py", "generate"), Lane("import torch", "torch")
WORDS = ("--model", "demo-student", "--prompt", "a red circle", "--overwrite", "--quiet")


class StartUp(Case):
    kind = "startup"
    title = "start-up of `generate.py`, one picture by one call of a 5 M network included"
    lanes = gpu_lanes = (DRAWN, IMPORTED)
    targets = gpu_targets = (
        Target(name="seconds beyond importing torch", over=DRAWN.name, under=IMPORTED.name, most=2.0, minus=True,
               checked=False),)  # fmt: skip
    rounds = 3

    def build(self, place: Place) -> Contest:
        home = tempfile.TemporaryDirectory(prefix="benchmark-")
        words = ["-m", "training", "generate", *WORDS, "--device", place.device, "--output", home.name]

        def agree() -> None:
            started(words, processor=place.processor)()
            assert any(Path(home.name).glob("*.png")), "no picture was drawn"

        calls = {"generate": started(words, processor=place.processor),
                 "torch": started(["-c", "import torch"], processor=place.processor)}  # fmt: skip
        return Contest(calls, agree, unit="pictures", alone=True)


def started(words: list[str], *, processor: bool) -> Callable[[], float]:
    """Runs `python WORDS` and gives its seconds. Raises UserError where it fails."""

    def call() -> float:
        before, since = os.times(), time.perf_counter()
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        after, seconds = os.times(), time.perf_counter() - since
        if done.returncode:
            raise UserError(f"python {' '.join(words)} failed: {done.stderr.strip()[-300:]}", code=1)
        used = after.children_user + after.children_system - before.children_user - before.children_system
        return used if processor else seconds

    return call


CASES = (StartUp(),)
