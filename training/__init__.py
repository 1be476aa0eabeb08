"""All that touches disk, clock and devices. Its public face: what is named here stays, and is loaded when first used.

    from training import load_pipeline
    pipeline = load_pipeline("runs/dit")                                  # or "demo", the model of the package
    (picture,) = pipeline("a red bicycle", seed=0)                        # PIL images
    pictures = pipeline(["a red bicycle", "a blue door"], seed=0, num_inference_steps=50, guidance_scale=4.0)

`load_autoencoder` gives an autoencoder alone, `__version__` the version of what is installed.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if find_spec("fcntl") is None or find_spec("resource") is None:  # locks of files, measures of memory: not on Windows
    from training.messages import tell

    tell("error: these programs run on Linux and macOS; on Windows within WSL")
    raise SystemExit(2)
if sys.platform == "darwin":  # read when torch is loaded: what Apple's kernels lack is done on the CPU, aloud
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
if TYPE_CHECKING:
    from training.models.assembly import load_pipeline as load_pipeline
    from training.models.autoencoders import load_autoencoder as load_autoencoder

    __version__: str

__all__ = ["load_autoencoder", "load_pipeline"]
_HOMES = {"load_autoencoder": "training.models.autoencoders", "load_pipeline": "training.models.assembly"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import_module("training.shadows").refuse_shadows()
        return getattr(import_module(_HOMES[name]), name)
    if name == "__version__":
        try:
            return metadata.version("latent-diffusion-from-scratch")
        except metadata.PackageNotFoundError:  # a checkout that is on the path, but not installed
            return "unknown"
    raise AttributeError(f"module 'training' has no attribute {name!r}")
