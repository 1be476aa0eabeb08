"""Peak memory of a process of its own."""

from __future__ import annotations

import subprocess
import sys

import tiny

# getrusage would tell of pytest: a child begins with the ru_maxrss of its parent. VmHWM begins with the program.
PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
"""


def told(code: str, limit: float = 200) -> list[str]:
    """The lines that `python -c code` prints; in it, `peak()` is the most memory it has held, in kB."""
    command = [sys.executable, "-c", PEAK + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tiny.ROOT, timeout=limit, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
