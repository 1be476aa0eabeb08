"""Commands as they can be pasted, in the way this program was called: it again, or another of the doors."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

# Of the environment, what decides what runs, and where; nothing that may be secret.
NEEDED = re.compile(
    r"(CUDA_VISIBLE_DEVICES|PYTHONPATH|HF_HOME|HF_HUB_OFFLINE|OMP_NUM_THREADS|(ACCELERATE|FSDP|NCCL|GLOO)_\w+)=(.*)",
    re.S,
)
HOME = Path(__file__).parents[1]  # holds this package, and in a checkout scripts/ too
INSTALLED = "latent-diffusion"  # the command that takes a verb; with -VERB at its end, that of one door
DEMO = "demo"
EMBEDDED = (DEMO, "demo-student")  # models that come with the package: what a command calls them, and their folders
HIDDEN = "HIDDEN"
SECRET = re.compile(r"(://)([^/?#]*@)?([^?#]*)([?#].*)?", re.DOTALL)  # user and password, what may be shown, query


def hide_secrets(word: str) -> str:
    """A word of a command; where it is an address, HIDDEN stands for user, password and query."""
    return SECRET.sub(_hidden, word)


def _hidden(found: re.Match[str]) -> str:
    mark, user, rest, query = found.groups()
    return mark + (f"{HIDDEN}@" if user else "") + rest + (f"?{HIDDEN}" if query else "")


def door(start: str, *words: object) -> str:
    """The command that opens the door VERB, for `start` "VERB …", with `words` quoted for a shell after it.

    As the door of this program was opened: `python scripts/VERB.py`, by its interpreter and in the folder of its own
    script; `latent-diffusion-VERB`; else `python -m training VERB`.
    """
    verb, *fixed = start.split()
    told = (shlex.quote(hide_secrets(str(word))) for word in words)
    return " ".join([*map(shlex.quote, opener(verb)), *fixed, *told])


def opener(verb: str, python: str = "") -> list[str]:
    """The first words of `door`; `python` is what the interpreter is called."""
    python = python or _interpreter()
    called, named = Path(sys.argv[0] or "."), verb.replace("_", "-")
    if by_module():
        return [python, "-m", "training", named]
    if called.suffix == ".py" and called.with_name(f"{verb}.py").is_file():
        return [python, str(called.with_name(f"{verb}.py"))]
    if called.name.startswith(INSTALLED):
        command = called.with_name(f"{INSTALLED}-{named}")
        found = shutil.which(command.name)
        return [command.name if found and Path(found) == command else str(command)]
    if Path("scripts").resolve() == HOME / "scripts" and Path("scripts", f"{verb}.py").is_file():
        return [python, f"scripts/{verb}.py"]
    return [python, "-m", "training", named]


def by_module() -> bool:
    """Whether this program is `python -m training`."""
    return Path(sys.argv[0] or ".").is_relative_to(HOME / "training")


def own_verb() -> str:
    """Which door this program is."""
    return Path(sys.argv[0]).name.removesuffix(".py").removeprefix(f"{INSTALLED}-").replace("-", "_")


def own_name() -> str:
    """What this program is called where its usage is told."""
    return f"python -m training {own_verb().replace('_', '-')}" if by_module() else Path(sys.argv[0]).name


def again(words: Iterable[str] = ()) -> tuple[list[str], dict[str, str]]:
    """The command that started this program, with more `words` at its end, and the environment it needs besides.

    Of several processes it is that of their launcher (torchrun, accelerate launch), where the system tells it. To be
    asked once at the start, too: a launcher may end before its processes.
    """
    command, environment = _started(tuple(sys.argv))
    return [*command, *words], environment


@cache
def _started(_argv: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    parent, words, plain = os.getppid(), sys.argv[1:], _plain()
    launcher, (start, *verb) = _arguments(parent), plain[_script(plain) :] or [""]
    if start == "-m":  # which launchers also call --module
        start, *verb = verb
    tails = [[name, *verb, *words] for name in (start, Path(start).name)] if start else []
    if any(launcher[-len(tail) :] == tail and len(launcher) > len(tail) for tail in tails):
        return launcher, _needed(parent, _above(parent))
    own = plain if plain and not (own_name().startswith(INSTALLED) and _script(plain) == 1) else opener(own_verb())
    return [*own, *words], _needed(os.getpid(), parent)


def assigned(environment: Mapping[str, str]) -> str:
    """`NAME=value ` of each, as a shell takes them before a command."""
    return "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items())


def _interpreter() -> str:
    word = sys.orig_argv[0] if sys.orig_argv else ""
    return word if Path(word).name.startswith("python") else "python"


def _plain() -> list[str]:
    """The words before this program's own; none where it was forked, or called from another program."""
    words = sys.argv[1:]
    plain = sys.orig_argv[: len(sys.orig_argv) - len(words)]
    given = sys.orig_argv[len(plain) :] == words and _script(plain) < len(plain)
    return plain if given and _names(plain, sys.argv[0]) else []


def _script(words: list[str]) -> int:
    """Where in a command of python the script stands, or `-m` of a module."""
    place = 1
    while place < len(words) and words[place].startswith("-") and words[place] not in ("-m", "-c"):
        place += 2 if words[place] in ("-X", "-W") else 1
    return place


def _names(words: list[str], script: str) -> bool:
    """Whether the last of python's own words name the script: by path, as a module, or by a verb."""
    program, last = words[-2], words[-1]
    if program == "-m":
        return last.rpartition(".")[2] == Path(script).stem
    return last == script or (Path(program).name in (INSTALLED, "training") and last.replace("-", "_") == own_verb())


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
