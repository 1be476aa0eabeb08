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
VERBS = "|".join(path.stem for path in tiny.SCRIPTS.glob("*_*.py"))  # which stand in prose without .py
COMMAND = re.compile(rf"\b(\w+(?=\.py\b)|{VERBS})\b(?:\.py)?((?: [a-z]+\b)?)")
SPEAKERS = {
    "say", "tell", "note", "warn", "announce", "UserError", "Unreachable", "ValueError", "as_user_error", "refuse",
}  # fmt: skip
BY_NAME = {"REFUSED"}  # constants that become a hint through a variable
# Of torchrun, accelerate launch, pip and tar.
OF_LAUNCHERS = {"--nproc-per-node", "--standalone", "--num_processes", "--mixed_precision", "--cpu", "--no-deps",
                "--use_deepspeed", "--use_fsdp", "--use_megatron_lm", "--use_parallelism_config", "--dynamo_backend",
                "--force-reinstall", "--zstd"}  # fmt: skip


class Hint(NamedTuple):
    """A message that proposes something: `name` is its file and text, {} for what is filled in, ⟨a¦b⟩ for either."""

    name: str
    text: str

    def stands_in(self, said: str) -> bool:
        """Whether the message is part of what was `said`."""
        pattern = re.escape(" ".join(self.text.split())).replace(re.escape("python scripts/"), r"\S*python\S* \S*")
        for mark, meaning in {re.escape("{}"): ".*?", "⟨": "(?:", "¦": "|", "⟩": ")"}.items():
            pattern = pattern.replace(mark, meaning)
        return re.search(pattern, " ".join(said.split())) is not None


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
            said = [text for text in map(static, node.values) if text]
            return said[0] if len(said) == 1 else f"⟨{'¦'.join(said)}⟩"
        case ast.IfExp():
            return f"⟨{static(node.body)}¦{static(node.orelse)}⟩"
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
    """All of them, in the order of their files; of a command within a hint, the hint alone."""
    paths = sorted([*(tiny.ROOT / "training").rglob("*.py"), *tiny.SCRIPTS.glob("*.py")])
    trees = {path: ast.parse(path.read_text("utf-8")) for path in paths}
    named = {name for tree in trees.values() for node in ast.walk(tree) for name in _names_in(_hints_of(node))}
    found: dict[str, Hint] = {}
    for path, tree in trees.items():
        said = [part for node in ast.walk(tree) for part in [*_hints_of(node), *_spoken(node), *_constant(node, named)]]
        within = {id(child) for part in said for child in ast.walk(part) if child is not part}
        for text in (static(part) for part in said if id(part) not in within or not isinstance(part, ast.Call)):
            if FLAG.search(text) or COMMAND.search(text):
                name = f"{path.relative_to(tiny.ROOT).as_posix()}: {' '.join(text.split())}"
                found[name] = Hint(name, text)
    return list(found.values())


def _hints_of(node: ast.AST) -> list[ast.expr]:
    """What is assigned to, given as, or stands for a `hint` where none is given."""
    match node:
        case ast.keyword(arg=str(name)) if "hint" in name:
            return [node.value]
        case ast.Assign() if any("hint" in ast.unparse(target) for target in node.targets):
            return [node.value]
        case ast.Call() if ast.unparse(node.func) == "as_user_error":
            return node.args[:1]
        case ast.FunctionDef():
            given = zip(node.args.args[::-1], node.args.defaults[::-1], strict=False)
            return [default for argument, default in given if "hint" in argument.arg]
    return []


def _spoken(node: ast.AST) -> list[ast.expr]:
    if not isinstance(node, ast.Call):
        return []
    function = ast.unparse(node.func).split(".")[-1]
    return [node] if function == "door" else node.args if function in SPEAKERS else []


def _names_in(parts: list[ast.expr]) -> list[str]:
    """Constants and functions that hints are made of."""
    nodes = [node for part in parts for node in ast.walk(part)]
    return [node.id if isinstance(node, ast.Name) else node.attr for node in nodes
            if isinstance(node, ast.Name | ast.Attribute)]  # fmt: skip


def _constant(node: ast.AST, named: set[str]) -> list[ast.expr]:
    """What a constant holds or a function gives back that a hint is made of."""
    match node:
        case ast.FunctionDef() if node.name in named - {"door"}:
            return [part.value for part in ast.walk(node) if isinstance(part, ast.Return) and part.value]
        case ast.Assign(targets=[ast.Name(id=name)]) if (name in named and name.isupper()) or name in BY_NAME:
            return list(node.value.values) if isinstance(node.value, ast.Dict) else [node.value]
    return []


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
