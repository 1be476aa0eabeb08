"""The conformance command: what it prints, and how it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_samplers.py"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, cwd=SCRIPT.parents[1])


def test_the_table_and_its_refusals(tmp_path: Path) -> None:
    flags = ["--samplers", "heun,ddpm", "--processes", "flow,vp", "--grids", "karras,uniform", "--steps", "16"]
    done = run(*flags, "--output", str(tmp_path / "table.md"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table.md").read_text() == done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| heun", "| ddpm"))]
    assert len(rows) == 8 and all(len(row.split("|")) == 10 for row in rows)
    calls, order = (rows[0].split("|")[index].strip() for index in (4, 7))
    assert calls == "31" and 1.75 < float(order) < 2.25
    assert "- flow x eps: prediction 'eps' cannot tell x0 from pure noise" in done.stdout


def test_an_unknown_name_is_one_clear_sentence() -> None:
    done = run("--samplers", "hewn")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--samplers: unknown name 'hewn'" in done.stderr and "dpmpp-2m" in done.stderr
