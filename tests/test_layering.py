"""Imports go one way, autoencoder <- ldm <- training <- scripts; the model packages are pure tensor code; sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "autoencoder": {"autoencoder"},
    "ldm": {"autoencoder", "ldm"},
    "training": {"autoencoder", "ldm", "training", "configs"},
    "scripts": {"autoencoder", "ldm", "training"},
}
PURE = {"autoencoder", "ldm"}
# What the model packages may use besides torch: nothing that reads a disk, a clock or a process, or is heavy.
PURE_IMPORTS = {
    *[
        "__future__",
        "abc",
        "bisect",
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "difflib",
        "enum",
        "fractions",
        "functools",
        "importlib",
        "inspect",
        "itertools",
        "json",
        "math",
    ],
    *["numbers", "operator", "re", "string", "typing", "unicodedata", "warnings", "zlib", "torch"],
    *["importlib", "pkgutil"],  # a family finds its own modules
    "fnmatch",  # patterns of names of layers
    "PIL",  # only inside a function: a pipeline hands out PIL images
}
# The rooms of training/ from the ground up: each may import what lies below it, none beside it.
FLOORS = (
    {"messages", "ledger", "commands"},
    {"errors", "progress", "next_step"},
    {"guarding", "shadows"},
    {"tensors"},
    {"files"},
    {"machine", "shapes"},
    {"settings", "pictures"},
    {"shards", "runs"},
    {"data", "packing"},
    {"models"},
    {"pages", "exchange"},
    {"loop", "encoding", "drawing"},
    {"stages", "measuring"},
    {"drills", "benchmarks", "studio"},
    {"planning"},  # measures with the meters of benchmarks
    {"doors"},
    {"__main__"},  # all doors as one program
    {"system"},  # today's place of what `training` itself offers now
)
# Product code depends on no test code: no import of a file that lies under tests/.
TESTS = {"tests", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, at any level."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.module or "", node.lineno


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    tree = parse(path)
    for module, line in imports(tree):
        top = module.partition(".")[0]
        if top in MAY_IMPORT or top == "configs":
            assert top in MAY_IMPORT[package], f"{path}:{line}: {package} must not import {module}"
        assert top not in TESTS, f"{path}:{line}: {module} is test code"
        if package in PURE and top not in {*MAY_IMPORT, "configs"}:
            assert top in PURE_IMPORTS, f"{path}:{line}: {module} has no place in pure tensor code"
    if package in PURE:
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not calls & {"open", "print", "input", "exec", "eval", "__import__"}, path
    longest = 60 if package == "scripts" else 300
    assert len(path.read_text("utf-8").splitlines()) <= longest, f"{path} is too long"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, last = node.body[0], node.end_lineno or node.lineno
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            start = (first.end_lineno or 0) + 1 if documented else first.lineno
            assert last - start < 40, f"{path}:{node.lineno}: {node.name} has {last - start + 1} lines"


def room(module: str) -> str:
    """The room of a module of training/, or the ground file itself."""
    return module.split(".")[1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def arrows(path: Path) -> set[str]:
    """The modules of this repository that a file imports anywhere in it, late or for type checking alone."""
    known, found = {module_of(path) for path in FILES}, set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= inside or {node.module} & known
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
    return found


def test_rooms_import_downwards() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    upward = []
    for path in FILES:
        own = module_of(path)
        if own.startswith("training."):
            for other in sorted(arrows(path)):
                if not other.startswith("training.") or room(own) == room(other):
                    continue
                if floor[room(other)] >= floor[room(own)]:
                    upward.append(f"{own} -> {other}")
    assert not upward, upward


def test_no_circle() -> None:
    """Late and TYPE_CHECKING imports count: a circle hidden by one is still two files that need each other."""
    waiting = {module_of(path): arrows(path) - {module_of(path)} for path in FILES}
    while ready := [name for name, needs in waiting.items() if not needs & waiting.keys()]:
        for name in ready:
            del waiting[name]
    assert not waiting, {name: sorted(needs & waiting.keys()) for name, needs in waiting.items()}


def test_light_at_import() -> None:
    """The command line answers before torch is loaded: what it imports at module level is light."""
    heavy = {"torch", "transformers", "lpips", "accelerate", "numpy", "torchvision", "safetensors", "PIL", "pydantic"}
    room = (ROOT / "training" / "settings").glob("*.py")
    for path in (ROOT / "training" / "errors.py", ROOT / "training" / "files.py", *room):
        tree = parse(path)
        top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        assert not {module.partition(".")[0] for module, _ in imports(top)} & heavy, path


def test_every_test_mirrors_a_room() -> None:
    rooms = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= {*MAY_IMPORT, "faults", "support"}
    for path in (ROOT / "tests" / "training").iterdir():
        assert path.suffix == ".py" or path.name == "__pycache__" or (ROOT / "training" / path.name).is_dir(), path


def test_no_drawer_for_odds_and_ends() -> None:
    assert not {path.stem for path in FILES} & {"utils", "util", "common", "misc", "helpers"}
