"""Commands as they can be hide_secrets: this one again, or another door of scripts/."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

# Of the environment, what decides what runs, and where; nothing that may be secret.
NEEDED = re.compile(
    r"(CUDA_VISIBLE_DEVICES|PYTHONPATH|HF_HOME|HF_HUB_OFFLINE|OMP_NUM_THREADS|(ACCELERATE|NCCL|GLOO)_\w+)=(.*)", re.S
)


HIDDEN = "HIDDEN"
SECRET = re.compile(r"(://)([^/?#]*@)?([^?#]*)([?#].*)?", re.DOTALL)  # user and password, what may be shown, query


def hide_secrets(word: str) -> str:
    """A word of a command; where it is an address, HIDDEN stands for user, password and query."""
    return SECRET.sub(_hidden, word)


def _hidden(found: re.Match[str]) -> str:
    mark, user, rest, query = found.groups()
    return mark + (f"{HIDDEN}@" if user else "") + rest + (f"?{HIDDEN}" if query else "")


def door(start: str, *words: object) -> str:
    """`python scripts/NAME.py …` for `start` "NAME …", with `words` quoted for a shell after it.

    By the interpreter that runs this program, and in the folder that its own script is called in.
    """
    script, *fixed = start.split()
    called = Path(sys.argv[0] or ".")
    folder = called.parent if called.name.endswith(".py") and (called.parent / f"{script}.py").is_file() else "scripts"
    program = [shlex.quote(_interpreter()), shlex.quote(f"{folder}/{script}.py")]
    return " ".join([*program, *fixed, *(shlex.quote(hide_secrets(str(word))) for word in words)])


def again(words: Iterable[str] = ()) -> tuple[list[str], dict[str, str]]:
    """The command that started this program, with more `words` at its end, and the environment it needs besides.

    Of several processes it is that of their launcher (torchrun, accelerate launch), where the system tells it. To be
    asked once at the start, too: a launcher may end before its processes.
    """
    command, environment = _started(tuple(sys.argv))
    return [*command, *words], environment


@cache
def _started(_argv: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    parent = os.getppid()
    launcher, own = _arguments(parent), _own()
    tail = own[_script(own) :]
    if launcher[-len(tail) :] == tail and len(launcher) > len(tail):
        return launcher, _needed(parent, _above(parent))
    return own, _needed(os.getpid(), parent)


def assigned(environment: Mapping[str, str]) -> str:
    """`NAME=value ` of each, as a shell takes them before a command."""
    return "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items())


def _interpreter() -> str:
    word = sys.orig_argv[0] if sys.orig_argv else ""
    return word if Path(word).name.startswith("python") else "python"


def _own() -> list[str]:
    """The words of this process; rebuilt where it was forked, or called from another program."""
    words = sys.argv[1:]
    plain = sys.orig_argv[: len(sys.orig_argv) - len(words)]
    if sys.orig_argv[len(plain) :] == words and _script(plain) < len(plain) and _names(plain, sys.argv[0]):
        return [*plain, *words]
    return [_interpreter(), sys.argv[0], *words]


def _script(words: list[str]) -> int:
    """Where in a command of python the script stands, or `-m` of a module."""
    place = 1
    while place < len(words) and words[place].startswith("-") and words[place] not in ("-m", "-c"):
        place += 2 if words[place] in ("-X", "-W") else 1
    return place


def _names(words: list[str], script: str) -> bool:
    """Whether the last of python's own words is the script, by path or as a module."""
    return words[-1] == script or (words[-2:-1] == ["-m"] and words[-1].rpartition(".")[2] == Path(script).stem)


def _arguments(process: int) -> list[str]:
    try:
        text = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # elsewhere than on Linux, or another user's
        return []
    return [os.fsdecode(word) for word in text.split(b"\0")[:-1]]


def _above(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _needed(process: int, above: int) -> dict[str, str]:
    """What of NEEDED a process was started with that the shell `above` it was not."""
    given, there = ({m[1]: m[3] for v in _environment(p) if (m := NEEDED.fullmatch(v))} for p in (process, above))
    return {name: value for name, value in given.items() if there.get(name) != value}


def _environment(process: int) -> list[str]:
    try:
        return [os.fsdecode(word) for word in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")]
    except OSError:
        return [f"{name}={value}" for name, value in os.environ.items()] if process == os.getpid() else []
