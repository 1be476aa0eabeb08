"""A mutation drill: each listed mistake is made in a copy of the tree, and the tests named beside it must fail.

The tests pass without any mistake, or nothing could be said. What no test notices is a survivor: write the test.
"""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import DATA, USAGE, UserError

if TYPE_CHECKING:
    import argparse

LEFT_OUT = (".git", "__pycache__", ".venv", ".*_cache", "*.egg-info")  # of the copy
KILLED, SURVIVED, TOO_LONG = "killed", "SURVIVED", "killed (time limit)"


@dataclass(frozen=True)
class Mutation:
    """One mistake: `old` becomes `new` in `file`; at least one of `tests` (pytest's node ids) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_mutations(path: Path) -> list[Mutation]:
    """The mutations of a TOML file, [[mutation]] each. Raises UserError (exit 2) where one lacks a key."""
    try:
        rows = tomllib.loads(path.read_text("utf-8"))["mutation"]
        return [Mutation(**{**row, "tests": tuple(row["tests"])}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as failure:
        hint = "each [[mutation]] has name, file, old, new and tests"
        raise UserError(f"{path}: no list of mutations ({failure})", hint=hint, code=USAGE) from None


def unfit_rows(root: Path, mutations: Sequence[Mutation]) -> list[str]:
    """What keeps mutations from being made: an old text that is not there exactly once, tests that do not exist."""
    problems = [f"{name}: the name is given twice" for name in _twice(mutation.name for mutation in mutations)]
    for mutation in mutations:
        path = root / mutation.file
        times = path.read_text("utf-8").count(mutation.old) if path.is_file() else 0
        if times != 1:
            problems.append(f"{mutation.name}: its old text occurs {times} times in {mutation.file}")
        if mutation.old == mutation.new or not mutation.tests:
            problems.append(f"{mutation.name}: changes nothing, or names no test")
        problems += [f"{mutation.name}: no test {test}" for test in mutation.tests if not _exists(root, test)]
    return problems


def _twice(names: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    return {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]


def _exists(root: Path, test: str) -> bool:
    """Whether a node id, its parameters aside, names a function of a test file (or the file itself)."""
    file, _, name = test.partition("::")
    if not (root / file).is_file():
        return False
    functions = ast.walk(ast.parse((root / file).read_text("utf-8")))
    return not name or any(isinstance(f, ast.FunctionDef) and f.name == name.partition("[")[0] for f in functions)


def drill(root: Path, mutations: Sequence[Mutation], limit: float) -> dict[str, str]:
    """Name -> killed or survived, each mutation in turn, its tests stopped after `limit` seconds.

    Raises UserError (exit 2) where a mutation cannot be made, and (exit 3) where tests fail without one.
    """
    if problems := unfit_rows(root, mutations):
        raise UserError("\n       ".join(problems), hint="correct the list", code=USAGE)
    outcomes: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        every = sorted({test for mutation in mutations for test in mutation.tests})
        if outcome(copy, every, limit * len(mutations)) != SURVIVED:
            hint = f"python -m pytest {' '.join(every[:3])}{' ...' if len(every) > 3 else ''}"
            raise UserError("the tests fail without any mutation", hint=hint, code=DATA)
        for mutation in mutations:
            since, path = time.monotonic(), copy / mutation.file
            whole = path.read_text("utf-8")
            path.write_text(whole.replace(mutation.old, mutation.new), "utf-8")
            outcomes[mutation.name] = outcome(copy, mutation.tests, limit)
            path.write_text(whole, "utf-8")
            print(f"{outcomes[mutation.name]:20} {time.monotonic() - since:5.1f} s  {mutation.name}", flush=True)
    return outcomes


def outcome(tree: Path, tests: Sequence[str], limit: float) -> str:
    """What became of a mutation under its tests. Raises UserError (exit 3) where pytest could not run them."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    # No bytecode: a file changed twice within a second, at equal length, would pass for its compiled form.
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=tree, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return TOO_LONG
        finally:
            if process.poll() is None:  # too long, or the drill itself is stopped
                os.killpg(process.pid, signal.SIGKILL)  # with all that the tests started
                process.wait()
        if code not in (0, 1):
            log.seek(0)
            raise UserError(f"pytest ended with {code}:\n{log.read()[-2000:]}", hint="run the tests alone", code=DATA)
    return KILLED if code else SURVIVED


def report(outcomes: dict[str, str]) -> int:
    """Print the table's last lines: how many were killed, and who survived. Returns the exit code, 1 for survivors."""
    survivors = [name for name, found in outcomes.items() if found == SURVIVED]
    print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} mutations killed")
    for name in survivors:
        print(f"survived: {name}")
    return bool(survivors)


def main(args: argparse.Namespace, root: Path) -> int:
    """The work of scripts/mutation_drill.py: the exit code."""
    mutations = [mutation for mutation in read_mutations(Path(args.list)) if args.only in mutation.name]
    if not mutations:
        raise UserError(f"no mutation's name holds '{args.only}'", code=USAGE)
    return report(drill(root, mutations, args.limit))
