"""How a script's main ends, whatever was raised in it."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from training.errors import UserError
from training.machine.signals import Stopped
from training.settings.net import run_main


def code_of(function: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    with pytest.raises(SystemExit) as caught:
        run_main(function)
    return caught.value.code


def throwing(failure: BaseException) -> Callable[[], object]:
    def main() -> None:
        raise failure

    return main


def recursive() -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    json.dumps(value)


FAILURES: dict[str, tuple[BaseException, int, str]] = {
    "a user's mistake": (UserError("no data", hint="give some", code=3), 3, "error: no data\nhint: give some\n"),
    "disk full": (OSError(errno.ENOSPC, "No space left on device", "/tmp/a"), 6, "cannot write /tmp/a: No space"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "/tmp/a"), 6, "cannot write /tmp/a: Read-only"),
    "no right": (PermissionError(errno.EACCES, "Permission denied", "/tmp/a"), 6, "/tmp/a: Permission denied"),
    "gone": (FileNotFoundError(errno.ENOENT, "No such file or directory", "/tmp/a"), 2, "/tmp/a: no such file"),
    "bytes as a name": (FileNotFoundError(errno.ENOENT, "No such file", b"/tmp/\xff"), 2, "no such file"),
    "a long name": (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 2, "the name is too long"),
    "open files": (OSError(errno.EMFILE, "Too many open files"), 6, "hint: raise the limit: ulimit -n"),
    "fork": (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 6, "hint: raise the limit: ulimit -u"),
    "no number": (OSError("something odd"), 6, "error: something odd"),
    "memory": (MemoryError(), 6, "error: out of memory"),
    "memory of torch": (torch.OutOfMemoryError("CUDA out of memory. Tried"), 6, "error: out of memory"),
    "memory of a CPU": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 6, "error: out of memory"),
    "a fault of ours": (ZeroDivisionError("division by zero"), 1, "unexpected ZeroDivisionError: division by zero"),
    "two lines": (RuntimeError("a\nerror: forged\x1b[2J"), 1, "unexpected RuntimeError: a error: forged\\x1b[2J"),
    "ctrl-c": (KeyboardInterrupt(), 130, ""),
    "a signal": (Stopped(15), 143, ""),
    "an exit": (SystemExit(7), 7, ""),
    "a pipe": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_a_sentence_and_a_code(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failure, code, expected = FAILURES[name]
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # whatever becomes of it
    assert code_of(throwing(failure), monkeypatch) == code
    said = capsys.readouterr().err
    assert expected in said and "Traceback" not in said and (not expected or said.startswith("error: "))
    assert len(said.splitlines()) <= 2 and (code != 1 or "--debug" in said)
    if isinstance(failure, Exception) and not isinstance(failure, BrokenPipeError):
        with pytest.raises(type(failure)):
            monkeypatch.setattr(sys, "argv", ["script.py", "--debug"])
            run_main(throwing(failure))


def test_nested_too_deeply(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(recursive, monkeypatch) == 3 and "nested too deeply" in capsys.readouterr().err


def test_success_has_the_code_of_success(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not code_of(lambda: None, monkeypatch)


def test_a_malformed_file_is_named(
    denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of whatever shape: the sentence names the file or its folder, and where the program was."""
    from training.models.folders import find

    def main() -> None:
        find(tmp_path)

    (tmp_path / "model.safetensors").write_bytes(b"")
    for text in ("7", "true", "null"):
        (tmp_path / "config.json").write_text(text)
        assert code_of(main, monkeypatch) in (1, 3, 4)
        said = capsys.readouterr().err
        assert str(tmp_path) in said and "Traceback" not in said


SCRIPT = "import sys; from training.messages import answer, tell; from training.settings.net import run_main\n"
BODIES = {
    "said": "def main():\n  for i in range(20000): answer('line %d' % i)\n  open('done', 'w').close()\n",
    "printed": "def main():\n  for i in range(20000): print('line', i)\n  open('done', 'w').close()\n",
    "brief": "def main():\n  print('line')\n",
    "told": "def main():\n  for i in range(20000): tell('line %d' % i)\n  open('done', 'w').close()\n",
}


@pytest.mark.parametrize(
    ("body", "streams", "code"),
    [("said", "| head -1", 0), ("told", "2>&1 | head -1", 0), ("printed", "| head -1", 141), ("said", ">/dev/full", 6),
     ("printed", ">/dev/full", 6), ("told", "2>/dev/full", 0), ("said", ">&-", 0), ("told", "2>&-", 0),
     ("brief", ">/dev/full", 6),
     ("printed", ">&- 2>&- <&-", 0)],
)  # fmt: skip
def test_streams_that_end(body: str, streams: str, code: int, tmp_path: Path) -> None:
    """Work goes on without a reader, and what was not done is never a success."""
    (tmp_path / "script.py").write_text(SCRIPT + BODIES[body] + "run_main(main)\n")
    command = f"set -o pipefail; {shlex.quote(sys.executable)} script.py {streams}"
    environment = {**tiny.ENVIRONMENT, "PYTHONPATH": str(tiny.ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert (tmp_path / "done").exists() == (code == 0)


def test_a_closed_stream_is_no_file_of_ours(tmp_path: Path) -> None:
    """The next file opened would have its number, and what a library prints would go into it."""
    noise = "os.write(1, b'noise'); os.write(2, b'noise')"
    script = SCRIPT + f"import os\ndef main():\n  file = open('data', 'w'); {noise}\n"
    (tmp_path / "script.py").write_text(script + "run_main(main)\n")
    environment = {**tiny.ENVIRONMENT, "PYTHONPATH": str(tiny.ROOT)}
    command = f"{shlex.quote(sys.executable)} script.py >&- 2>&- <&-"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment).returncode == 0
    assert (tmp_path / "data").read_bytes() == b""


DOORS = sorted(path.stem for path in tiny.SCRIPTS.glob("*.py"))


@pytest.mark.parametrize("script", DOORS)
def test_every_script_ends_through_the_net(script: str) -> None:
    last = tiny.SCRIPTS.joinpath(f"{script}.py").read_text().splitlines()[-2:]
    assert last == ['if __name__ == "__main__":', "    run_main(main)"]


def test_no_half_model_of_another_average(
    denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """posthoc_ema on a disk that fills: what appears under the name that was asked for is whole, or absent."""
    monkeypatch.setattr("training.stages.rebuild.reconstruct", lambda *_: ({"denoiser.backbone.x": torch.zeros(1)}, 6))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("training.stages.rebuild.store_ingredients", full)
    problem = tiny.refused("posthoc_ema", "--model", denoiser, "--length", "0.1", "--output", tmp_path / "new")
    assert problem.code == 6 and not list(tmp_path.iterdir())
