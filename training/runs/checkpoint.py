"""One checkpoint: what it holds, what its folder is worth.

    step-00000200/manifest.json    format, step, bytes and sha256 of every other file; written last
    step-00000200/model.safetensors ema.safetensors optimizer.safetensors state.json
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import CHECKPOINT, NUMERICAL, UserError
from training.files import file_sha256
from training.guarding import read_plain, read_record, unreadable
from training.tensors import load_tensors

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
TENSOR_FILES = ("model", "ema", "optimizer")
LARGEST_STATE = 64 << 20  # bytes of state.json
NAME = re.compile(r"step-\d{8,}")
# How a score was measured, 1 where a checkpoint does not say: 1, on the first held-out samples, in the precision of
# the training; 2, on held-out samples evenly, in float32. Numbers of two rules are not compared.
SCORED_BY = 2


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on: named tensors by file, and the plain state beside them."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]  # "model" | "ema" | "optimizer" -> name -> tensor
    state: Mapping[str, Any]


class Stored(Mapping[str, Mapping[str, "Tensor"]]):
    """The tensors of a checkpoint on the disk, each file read when it is asked for: no process holds all at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        return load_tensors(self.path / f"{name}.safetensors")

    def __iter__(self) -> Iterator[str]:
        return iter(TENSOR_FILES)

    def __len__(self) -> int:
        return len(TENSOR_FILES)


def own(path: Path) -> bool:
    """Whether a folder is a checkpoint as `save` leaves it: of the step its name says, no file but its manifest's."""
    try:
        manifest = read_record(path / "manifest.json", {"step": int, "files": dict})
        return path.name == f"step-{manifest['step']:08d}" and {p.name for p in path.iterdir()} <= {
            *manifest["files"],
            "manifest.json",
        }
    except (UserError, OSError):
        return False


def score(path: Path, rule: int = SCORED_BY) -> float | None:
    """The validation score saved with a checkpoint, lower is better; None where it has none, or one of another rule."""
    try:
        state = json.loads(read_plain(path / "state.json"))
        value = state.get("score") if state.get("scored_by", 1) == rule else None
        return float(value) if value is not None and math.isfinite(value) else None
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def damage(path: Path) -> str:
    """Why a checkpoint folder cannot be trusted; empty where every file matches the manifest.

    Raises UserError where the format is newer than this program, or the right to read it is not given.
    """
    try:
        manifest = json.loads(read_plain(path / "manifest.json"))
        files, version, step = manifest["files"], int(manifest["format"]), int(manifest["step"])
        if version > FORMAT:
            raise UserError(
                f"checkpoint format {version} is newer than this program understands ({FORMAT})",
                hint="update this package",
                code=CHECKPOINT,
            )
        if NAME.fullmatch(path.name) and path.name != f"step-{step:08d}":
            return f"its manifest is that of step {step}"
        for name in (*(f"{t}.safetensors" for t in TENSOR_FILES), "state.json"):
            if name not in files:
                return f"{name} is not in the manifest"
            if not (path / name).is_file() or (path / name).is_symlink():
                return f"{name} is missing"
            if (path / name).stat().st_size != files[name]["bytes"]:
                return f"{name}: size differs"
            if file_sha256(path / name) != files[name]["sha256"]:
                return f"{name}: sha256 differs"
    except PermissionError as failure:  # sound, as far as one knows: no older one is to stand in for it
        raise unreadable(Path(failure.filename or path), failure) from None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError, AttributeError):
        return "manifest.json is missing or unreadable"
    return ""


def refuse_non_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError (exit 5) where any tensor holds NaN or infinity: bad weights never rotate good ones away."""
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise UserError(
            f"refusing to save: {len(bad)} tensors are not finite (first: {bad[0]})",
            hint="lower --lr, or use --mixed-precision no",
            code=NUMERICAL,
        )
