"""One checkpoint: what it holds, what its folder is worth.

    step-00000200/manifest.json    format, step, bytes and sha256 of every other file; written last
    step-00000200/model.safetensors ema.safetensors optimizer.safetensors state.json
    step-00000200/shard-….safetensors state.json    in format 2, of processes that share out their tensors (parts.py)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import CHECKPOINT, NUMERICAL, UserError
from training.files import file_sha256
from training.guarding import read_plain, read_record, unreadable
from training.runs import parts
from training.tensors import load_tensors

if TYPE_CHECKING:
    from torch import Tensor

FORMAT, WHOLE = 2, 1  # the newest, of parts, and that of whole tensors
TENSOR_FILES = ("model", "ema", "optimizer")
LARGEST_STATE = 64 << 20  # bytes of state.json
NAME = re.compile(r"step-\d{8,}")
# How a score was measured, 1 where a checkpoint does not say: 1, on the first held-out samples, in the precision of
# the training; 2, on held-out samples evenly, in float32. Numbers of two rules are not compared.
SCORED_BY = 2
OTHER_SCORES = (
    "note: this run was begun by a version that validated on the first held-out samples, in the precision of the "
    "training; from here on they lie evenly over the split and are measured in float32. Scores of both kinds are not "
    "compared: the best checkpoint of each is kept"
)


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
        whole = self.path / f"{name}.safetensors"
        return parts.read(self.path, name) if parts.in_parts(self.path) else load_tensors(whole)

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
        for name in (*tensor_files(files, version), "state.json"):
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


def tensor_files(files: Iterable[str], version: int) -> list[str]:
    """The files of tensors of a checkpoint whose manifest names `files`."""
    whole = [f"{name}.safetensors" for name in TENSOR_FILES]
    shares = [name for name in files if name not in whole and name.endswith(".safetensors")]
    return shares if version > WHOLE and shares else whole


def non_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """The weights and averages whose part that this process holds has NaN or infinity in it."""
    held = ((name, parts.local(value)) for kind in ("model", "ema") for name, value in tensors[kind].items())
    bad = (name for name, value in held if value.is_floating_point() and not value.isfinite().all())
    return [*dict.fromkeys(bad)]


def refuse_non_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError (exit 5) where any tensor holds NaN or infinity: bad weights never rotate good ones away."""
    refuse(non_finite({"model": tensors, "ema": {}}))


def refuse(bad: list[str]) -> None:
    """Raise UserError (exit 5) where tensors are `bad`, which hold NaN or infinity."""
    if bad:
        raise UserError(
            f"refusing to save: {len(bad)} tensors are not finite (first: {bad[0]})",
            hint="lower --lr, or use --mixed-precision no",
            code=NUMERICAL,
        )
