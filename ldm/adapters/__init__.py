"""Adapters: what is learned upon a frozen base. A new one is an `AdapterConfig` in a module here, which lists it in its
`ADAPTERS`."""

from __future__ import annotations

from ldm.adapters.base import Adapter, AdapterConfig, NoAdapter
from ldm.families import members

ADAPTERS: tuple[type[AdapterConfig], ...] = members(__name__, "ADAPTERS", ("none",))  # first: default

__all__ = ["ADAPTERS", "Adapter", "AdapterConfig", "NoAdapter"]
