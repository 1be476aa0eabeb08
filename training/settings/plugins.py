"""Kinds that installed packages add to a family, by entry points of the group `latent_diffusion.SECTION`: the name is
the kind, the object a frozen dataclass; SECTION is any section of a config that is a choice among kinds.

In the other package's pyproject.toml:

    [project.entry-points."latent_diffusion.sampler"]
    secant = "my_package.samplers:Secant"

The kind is then a config key, a flag, and a name in --help; nothing of the package is imported before a config is read.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import TYPE_CHECKING, Any

from training.errors import UserError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "latent_diffusion"


@cache
def _installed() -> Any:  # what finds entry points by `select`; Python 3.11 has a class of its own for it
    from importlib.metadata import entry_points

    return entry_points()  # of all groups: each question reads every distribution anew


def added(section: str, own: list[str]) -> dict[str, EntryPoint]:
    """The entry points of a section by kind, beside our `own` kinds. Imports nothing of theirs.

    Raises UserError, naming the package, where a kind is already there.
    """
    found: dict[str, EntryPoint] = {}
    for entry in _installed().select(group=f"{GROUP}.{section}"):
        if entry.name in own or entry.name in found:
            there = "latent-diffusion-from-scratch" if entry.name in own else _package(found[entry.name])
            raise _wrong(section, entry, f"{there} has that kind already")
        found[entry.name] = entry
    return found


def members(section: str, own: list[str]) -> tuple[type, ...]:
    """The dataclasses that installed packages add to a section.

    Raises UserError, naming the package, for what cannot be imported, is no dataclass, or is of another kind.
    """
    return tuple(_member(section, entry) for entry in added(section, own).values())


def _member(section: str, entry: EntryPoint) -> type:
    try:
        member = entry.load()
    except Exception as failure:  # whatever the other package raises
        raise _wrong(section, entry, f"{entry.value} cannot be imported ({failure})") from failure
    if not isinstance(member, type) or not dataclasses.is_dataclass(member):
        raise _wrong(section, entry, f"{entry.value} is not a dataclass")
    kind = {field.name: field.default for field in dataclasses.fields(member)}.get("kind")
    if kind != entry.name:
        raise _wrong(section, entry, f'{entry.value} lacks the field kind: str = "{entry.name}"')
    return member


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "of an unknown name"


def _wrong(section: str, entry: EntryPoint, why: str) -> UserError:
    package = _package(entry)
    what = f'package {package}, which adds {section}.kind "{entry.name}": {why}'
    return UserError(what, hint=f"mend or remove it: pip uninstall {package}")
