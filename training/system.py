"""Deprecated: `from training.system import load_pipeline` is `from training import load_pipeline` now."""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "load_pipeline":
        raise AttributeError(f"module 'training.system' has no attribute {name!r}")
    import training

    warnings.warn("training.system has moved: from training import load_pipeline", DeprecationWarning, stacklevel=2)
    return training.load_pipeline
