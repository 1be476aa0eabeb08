"""The conformance command: what it prints, and how it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from ldm.samplers import UniPC

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


def test_samplers_agree_on_a_run_or_the_command_fails(
    denoiser: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--model", denoiser, "--samplers", "heun,dpmpp-2m,unipc,ddpm", "--prompt", "a red circle")
    assert tiny.call("check_samplers", *flags, "--steps", 40) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| heun", "| d", "| unipc"))]
    assert [row.split("|")[4].strip() for row in rows] == ["yes", "yes", "yes", "stochastic"]
    right = UniPC.step
    monkeypatch.setattr(UniPC, "step", lambda self, denoise, x, *rest: right(self, denoise, 1.02 * x, *rest))
    stray = tiny.refused("check_samplers", *flags, "--steps", 6)
    assert stray.code == 5 and "unipc: further than 5% from rk4 after 6 steps" in str(stray)


def test_the_benchmark_counts_calls_waits_and_what_is_held(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.call("benchmark_samplers", "--samplers", "heun,dopri5", "--steps", 2, "--side", 4) == 0
    heun, pair = (line.split("|") for line in capsys.readouterr().out.splitlines()[-2:])
    assert heun[2].strip() == "3" and heun[6].strip() == "0" and pair[6].strip() == "1"
    for row in (heun, pair):
        early, late = (int(part) for part in row[7].split(","))
        assert late <= early
    assert "unknown name 'hewn'" in str(tiny.refused("benchmark_samplers", "--samplers", "hewn"))
