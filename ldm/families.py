"""Families of kinds that are found by looking: a new member is one new module in the family's package."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules


def members(package: str, path: Iterable[str], base: type, first: type) -> tuple[type, ...]:
    """The classes of a `package` at `path` that can be built and derive from `base`, module by module; `first` leads,
    which makes it the default."""
    found: list[type] = [first]
    for module in sorted(f"{package}.{entry.name}" for entry in iter_modules(path)):
        for value in vars(import_module(module)).values():
            if isinstance(value, type) and issubclass(value, base) and value.__module__ == module:
                found += [] if isabstract(value) or value in (base, first) else [value]
    return tuple(found)
