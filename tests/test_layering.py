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
        "enum",
        "fractions",
        "functools",
        "importlib",
        "inspect",
        "itertools",
        "json",
        "math",
    ],
    *["numbers", "operator", "pkgutil", "re", "string", "typing", "unicodedata", "warnings", "zlib", "torch"],
    "PIL",  # only inside a function: a pipeline hands out PIL images
}
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
        elif package in PURE:
            assert top in PURE_IMPORTS, f"{path}:{line}: {module} has no place in pure tensor code"
    if package in PURE:
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not calls & {"open", "print", "input", "exec", "eval", "__import__"}, path
    assert len(path.read_text("utf-8").splitlines()) <= 300, f"{path} is too long"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, last = node.body[0], node.end_lineno or node.lineno
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            start = (first.end_lineno or 0) + 1 if documented else first.lineno
            assert last - start < 40, f"{path}:{node.lineno}: {node.name} has {last - start + 1} lines"


def test_light_at_import() -> None:
    """The command line answers before torch is loaded: what it imports at module level is light."""
    heavy = {"torch", "transformers", "lpips", "accelerate", "numpy", "torchvision", "safetensors", "PIL", "pydantic"}
    for name in ("cli", "errors", "settings", "files", "config"):
        tree = parse(ROOT / "training" / f"{name}.py")
        top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        assert not {module.partition(".")[0] for module, _ in imports(top)} & heavy, name


def test_every_test_mirrors_a_room() -> None:
    rooms = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= {*MAY_IMPORT, "faults"}


def test_no_drawer_for_odds_and_ends() -> None:
    assert not {path.stem for path in FILES} & {"utils", "util", "common", "misc", "helpers"}
