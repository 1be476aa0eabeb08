"""Checkpoints: staged, fsynced, hashed in a manifest, renamed, pointed to, pruned; one layout for any world size."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import CHECKPOINT, NUMERICAL, UserError
from training.files import (
    disk_error,
    file_sha256,
    finite,
    read_record,
    refuse_link,
    sync_folder,
    write_bytes,
    write_json,
)
from training.guarding import read_plain, read_whole, unreadable
from training.machine.faults import fault
from training.messages import note, warn
from training.tensors import check_safetensors, load_tensors, save_tensors

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


class Checkpoints:
    """The `checkpoints/` folder of a run. Only one process may write.

    Kept are the newest `keep_last`, any that holds a file named `pinned`, and with `keep_best` the one of the lowest
    `score` in its state: of each rule by which scores were measured, where a run goes on that has some of an earlier.
    """

    def __init__(self, run: Path, keep_last: int = 2, *, keep_best: bool = False) -> None:
        self.folder, self.keep_last, self.keep_best = run / "checkpoints", keep_last, keep_best
        self.told: set[Path] = set()  # what pruning leaves, told once

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write one checkpoint durably, point `latest` to it, prune old ones.

        Raises UserError for weights that are not finite (older checkpoints stay as they are) and for a full disk.
        """
        # Refused before anything is written, so that what lies there stays untouched.
        refuse_non_finite({**checkpoint.tensors["model"], **checkpoint.tensors["ema"]})
        target = self.folder / f"step-{checkpoint.step:08d}"
        staging = self.folder / f".tmp-{target.name}-{os.getpid()}"
        refuse_link(self.folder)
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
                sync_folder(self.folder.parent)  # what is made durable inside is lost without its folder's own name
            # All is written under a name that no reader takes for a checkpoint; a kill leaves only that, for `sweep`.
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            fault("checkpoint.staging")
            for name in TENSOR_FILES:
                save_tensors(staging / f"{name}.safetensors", checkpoint.tensors[name])
                fault("checkpoint.file")
            write_json(staging / "state.json", finite(checkpoint.state))
            fault("checkpoint.file")
            # The manifest is last: it hashes the other files as they lie on the disk.
            files = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(staging.iterdir())}
            write_json(staging / "manifest.json", {"format": FORMAT, "step": checkpoint.step, "files": files})
            fault("checkpoint.manifest")
            if target.exists():  # the same step again, after a resume from an earlier one
                self._remove(target) if target.is_symlink() or own(target) else self._put_aside(target)
            fault("checkpoint.rename")
            staging.replace(target)  # the checkpoint exists from here on, whole
            sync_folder(self.folder)  # the rename itself, which may else be lost with the power
            fault("checkpoint.latest")
            # Only for people and other programs: `newest` goes by names and manifests, so an old pointer does no harm.
            write_bytes(self.folder / "latest", f"{target.name}\n".encode())
        except OSError as failure:
            raise disk_error(target, failure) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self.prune(target)  # only now: old ones go when the new one is safe
        return target

    def load(self, path: Path, *, verified: bool = False) -> Checkpoint:
        """Open one checkpoint, each file read when it is asked for. Raises UserError naming the first damage, unless it
        has been `verified`: of several processes one does that, or each would read every byte once more."""
        if not verified:
            self._refuse_damaged(path)
        for name in TENSOR_FILES:
            check_safetensors(path / f"{name}.safetensors")
        step = read_record(path / "manifest.json", {"step": int})["step"]
        return Checkpoint(step, Stored(path), read_record(path / "state.json", {}, limit=LARGEST_STATE))

    def _refuse_damaged(self, path: Path) -> None:
        if reason := damage(path):
            raise UserError(
                f"checkpoint {path.name} is damaged ({reason})",
                hint="use --resume auto to take the newest sound one",
                code=CHECKPOINT,
            )

    def newest(self) -> Path | None:
        """The newest sound checkpoint, damaged ones passed over with a warning; None where there is none at all.

        Raises UserError where every checkpoint is damaged: a run never silently starts again from zero.
        """
        folders = sorted((p for p in self.folder.glob("step-*") if p.is_dir()), reverse=True)
        damages: list[str] = []
        for path in folders:
            if not (reason := damage(path)):
                for text in damages:
                    warn(f"{text}; using {path.name}")
                self._check_pointer(path)
                return path
            damages.append(f"checkpoint {path.name} is damaged ({reason})")
        if folders:
            raise UserError(
                f"no usable checkpoint in {self.folder} ({len(folders)} found, all damaged)",
                hint="; ".join(damages),
                code=CHECKPOINT,
            )
        return None

    def sweep(self) -> None:
        """Remove what a killed writer left. Only for the process that holds the run: a reader would break its save."""
        for leftover in self.folder.glob(".tmp-step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
            note(f"removed unfinished checkpoint {leftover.name}")

    def find(self, resume: str | None) -> Path | None:
        """The checkpoint that `--resume auto|latest|NAME|PATH` means, verified; None = start fresh.

        Raises UserError where there is none, and for a PATH that is not one of this run's: its step is not this run's.
        """
        if not resume:
            return None
        if resume in ("auto", "latest"):
            path = self.newest()
            if path is None and resume == "latest":
                raise UserError(
                    f"no checkpoint in {self.folder}",
                    hint="use --resume auto to start fresh where there is none",
                    code=CHECKPOINT,
                )
            return path
        for path in (self.folder / resume, Path(resume)):
            if path.is_dir() and NAME.fullmatch(path.name) and path.parent.resolve() == self.folder.resolve():
                self._refuse_damaged(path)
                return path
        if Path(resume).is_dir():
            raise UserError(
                f"{resume} is not a checkpoint of this run, which has its own in {self.folder}",
                hint="to begin a new run with the weights of another, give --init-from and another --output",
                code=CHECKPOINT,
            )
        raise UserError(
            f"no checkpoint {resume}",
            hint=f"known: {', '.join(sorted(p.name for p in self.folder.glob('step-*'))) or 'none'}",
            code=CHECKPOINT,
        )

    def prune(self, last: Path) -> None:
        """Keep the newest ones up to `last`; later ones belong to a future that a resume from before them gave up.

        What goes is what this program wrote: a folder with a file that its manifest does not list stays, and is told.
        """
        folders = sorted(p for p in self.folder.glob("step-*") if p.is_dir() and NAME.fullmatch(p.name))
        earlier = [p for p in folders if p.name <= last.name]
        survivors = {*earlier[-self.keep_last :], *(p for p in folders if (p / "pinned").exists())}
        for rule in range(1, SCORED_BY + 1) if self.keep_best else ():
            if scores := {p: s for p in earlier if (s := score(p, rule)) is not None}:
                survivors.add(min(scores, key=lambda p: scores[p]))
        for path in (p for p in folders if p not in survivors):
            if not (path.is_symlink() or own(path)):
                if path not in self.told:
                    warn(f"{path} is not removed: it holds more than a checkpoint, or less")
                self.told.add(path)
                continue
            try:
                self._remove(path)
            except OSError as failure:
                warn(f"could not remove old checkpoint {path.name}: {failure}")
            fault("checkpoint.prune")

    def _check_pointer(self, newest: Path) -> None:
        """`latest` may be behind, where a kill came before it was written; missing, or naming none, is told."""
        pointer = self.folder / "latest"
        try:
            name = read_whole(pointer, limit=80).decode("utf-8", "replace").strip()
            if NAME.fullmatch(name) and (self.folder / name).is_dir():
                return
            reason = f"names no checkpoint ({name!r})"
        except UserError as problem:
            reason = "is missing" if not pointer.exists() else problem.what
        warn(f"{pointer} {reason}; going by the checkpoints themselves: {newest.name}")

    def _put_aside(self, path: Path) -> None:
        """Make room for a checkpoint of the same step where a folder holds files of somebody else's, too."""
        kept = next(p for n in itertools.count(1) if not (p := path.with_name(f"kept-{path.name}-{n}")).exists())
        path.replace(kept)
        warn(f"{path} held more than a checkpoint, or less; it is {kept.name} now")

    def _remove(self, path: Path) -> None:
        """Rename, then delete: a kill in between leaves no half checkpoint, only a folder that `sweep` removes.

        Of a checkpoint that a link keeps elsewhere, the link goes; nothing outside the run is deleted.
        """
        if path.is_symlink():
            path.unlink()
            return
        gone = path.with_name(f".tmp-{path.name}-old")
        shutil.rmtree(gone, ignore_errors=True)
        path.replace(gone)
        shutil.rmtree(gone)


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
