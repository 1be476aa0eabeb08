"""Every message of the doors that proposes a flag or a command, read from the source; and the flags of every door."""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import sys
from functools import cache
from typing import NamedTuple
from unittest.mock import patch

import tiny

FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*(?:\.\w+)?")
COMMAND = re.compile(r"\b(\w+)\.py((?: [a-z]+\b)?)")
SPEAKERS = {"tell", "note", "warn", "announce", "UserError", "Unreachable", "ValueError", "as_user_error"}
# Of torchrun, accelerate launch and pip.
OF_LAUNCHERS = {"--nproc-per-node", "--standalone", "--num_processes", "--mixed_precision", "--cpu",
                "--force-reinstall", "--no-deps"}  # fmt: skip


class Hint(NamedTuple):
    """A message that proposes something: `name` is its file and its text, {} for what is filled in."""

    name: str
    text: str


class Caught(Exception):
    """A parser on the point of parsing."""


def static(node: ast.AST) -> str:
    """The text of an expression as far as it stands in the source."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr():
            return "".join(map(static, node.values))
        case ast.FormattedValue():
            return "{}" if not isinstance(node.value, ast.Call | ast.IfExp) else static(node.value) or "{}"
        case ast.BinOp():
            return static(node.left) + static(node.right)
        case ast.BoolOp():
            return " | ".join(filter(None, map(static, node.values)))
        case ast.IfExp():
            return f"{static(node.body)} | {static(node.orelse)}"
        case ast.Call() if ast.unparse(node.func) == "door":
            if not isinstance(node.args[0], ast.Constant):
                return ""
            script, _, rest = static(node.args[0]).partition(" ")
            return f"python scripts/{script}.py {rest}{' {}' if node.args[1:] else ''}".rstrip()
        case ast.Call() if ast.unparse(node.func).endswith((".join", ".split", ".replace", "str")):
            return "{}"
        case ast.Call():
            return "".join(map(static, node.args))
    return ""


def hints() -> list[Hint]:
    """All of them, in the order of their files."""
    found: dict[str, Hint] = {}
    for path in sorted([*(tiny.ROOT / "training").rglob("*.py"), *tiny.SCRIPTS.glob("*.py")]):
        said: list[ast.AST] = []
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.keyword | ast.Assign):
                named = [node.arg or ""] if isinstance(node, ast.keyword) else map(ast.unparse, node.targets)
                said += [node.value] if any("hint" in name for name in named) else []
            elif isinstance(node, ast.Call):
                function = ast.unparse(node.func).split(".")[-1]
                said += [node] if function == "door" else node.args if function in SPEAKERS else []
        for text in map(static, said):
            if FLAG.search(text) or COMMAND.search(text):
                name = f"{path.relative_to(tiny.ROOT).as_posix()}: {' '.join(text.split())}"
                found[name] = Hint(name, text)
    return list(found.values())


@cache
def parser(script: str) -> argparse.ArgumentParser:
    """The parser of scripts/SCRIPT.py."""

    def catch(self: argparse.ArgumentParser, *_: object) -> None:
        raise Caught(self)

    main = runpy.run_path(str(tiny.SCRIPTS / f"{script}.py"))["main"]
    with patch.object(sys, "argv", [script]), patch.object(argparse.ArgumentParser, "parse_known_args", catch):
        try:
            main()
        except Caught as caught:
            return caught.args[0]  # type: ignore[no-any-return]
    raise AssertionError(f"{script} parses nothing")


def options(script: str) -> set[str]:
    """Every flag of a door, of its verbs too."""
    return set(parser(script)._options())  # type: ignore[attr-defined]


def verbs(script: str) -> set[str]:
    """The verbs of a door."""
    actions = parser(script)._actions
    named = [action.choices for action in actions if isinstance(action, argparse._SubParsersAction)]
    positional = [action.choices for action in actions if not action.option_strings and action.choices]
    return {str(verb) for choices in named + positional for verb in choices or ()}
