"""The systems that the programs run on: one sentence elsewhere, and shell scripts without tools of GNU alone."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import tiny

SHELL = [tiny.ROOT / ".ci" / "run", *sorted(tiny.SCRIPTS.rglob("*.sh"))]
GNU = re.compile(r"\b(realpath|readlink -f|sha256sum|md5sum|nproc|timeout|stat -c|date -d|sed -i|mapfile|declare -A)\b")
WITHOUT = "import sys, importlib.util as u; f = u.find_spec; u.find_spec = lambda n: None if n in {0} else f(n); "


@pytest.mark.parametrize("script", sorted(path.name for path in tiny.SCRIPTS.glob("*.py")))
def test_one_sentence_on_windows(script: str) -> None:
    code = WITHOUT.format(("fcntl", "resource")) + "sys.modules['fcntl'] = None; import runpy; "
    done = tiny.spawn("-c", code + f"runpy.run_path({str(tiny.SCRIPTS / script)!r}, run_name='__main__')")
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: these programs run on Linux and macOS; on Windows within WSL\n"


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_run_on_both_systems(path: Path) -> None:
    code = [line.partition(" #")[0] for line in path.read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in code if GNU.search(line)]
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


def test_a_path_is_meant_from_where_the_script_was_started(tmp_path: Path) -> None:
    functions = (tiny.SCRIPTS / "environment.sh").read_text()
    absolute = functions[functions.index("absolute()") : functions.index("run()")]
    command = ["bash", "-c", f"{absolute}\nabsolute 'a b/c'; absolute /x"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [f"{tmp_path}/a b/c", "/x"]
