"""All that touches disk, clock and devices. Its public face: what is named here stays, and is loaded when first used.

    from training import load_pipeline
    images = load_pipeline("runs/dit")(["a red bicycle"], seeds=[0])    # PIL images
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if find_spec("fcntl") is None or find_spec("resource") is None:  # locks of files, measures of memory: not on Windows
    from training.messages import tell

    tell("error: these programs run on Linux, and on macOS on the CPU; on Windows within WSL")
    raise SystemExit(2)
if TYPE_CHECKING:
    from training.models.assembly import load_pipeline as load_pipeline
    from training.models.autoencoders import load_autoencoder as load_autoencoder

__all__ = ["load_autoencoder", "load_pipeline"]
_HOMES = {"load_autoencoder": "training.models.autoencoders", "load_pipeline": "training.models.assembly"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'training' has no attribute {name!r}")
