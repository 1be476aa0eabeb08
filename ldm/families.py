"""Families whose members lie in the modules of a package: one file more there, and it has one member more.

Each module lists its own members in a tuple of the family's name; modules without one hold what the members share.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any


def members(package: str, family: str, order: Sequence[str] = ()) -> tuple[Any, ...]:
    """The classes that a package's modules list under `family`, module by module; those whose kind is in `order` first.
    """
    found = import_module(package)
    modules = [import_module(f"{package}.{module.name}") for module in iter_modules(found.__path__)]
    listed = [member for module in modules for member in getattr(module, family, ())]
    return tuple(sorted(listed, key=lambda member: order.index(member.kind) if member.kind in order else len(order)))
