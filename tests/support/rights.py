"""A file without the right to read it, for any user: root passes over rights."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest


def deny(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """From now on no file whose path ends so can be opened."""
    real = os.open

    def denied(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).endswith(ending):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", denied)
