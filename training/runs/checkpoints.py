"""Checkpoints: staged, fsynced, hashed in a manifest, renamed, pointed to, pruned; one layout for any world size."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.errors import CHECKPOINT, UserError
from training.files import finite, sync_folder, write_bytes, write_json
from training.guarding import disk_error, read_record, read_whole, refuse_link
from training.machine.faults import fault
from training.machine.meeting import meet
from training.messages import note, warn
from training.runs.checkpoint import (
    FORMAT,
    LARGEST_STATE,
    NAME,
    SCORED_BY,
    TENSOR_FILES,
    WHOLE,
    Checkpoint,
    Stored,
    damage,
    non_finite,
    own,
    refuse,
    score,
    tensor_files,
)
from training.runs.parts import described, write_parts
from training.tensors import check_safetensors, save_tensors


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
        refuse(non_finite(checkpoint.tensors))
        return self._save(checkpoint, f"{os.getpid()}", _write_whole, WHOLE)

    def save_parts(self, checkpoint: Checkpoint, *, main: bool) -> None:
        """The same by all processes, of which each writes its parts, and the `main` one all else. Collective.

        What one process is refused ends all, and older checkpoints stay as they are.
        """
        from accelerate.utils import gather_object

        def write(staging: Path, checkpoint: Checkpoint) -> dict[str, Any]:
            meet()  # the folder is there
            return write_parts(staging, checkpoint.tensors)

        refuse(sorted({*gather_object(non_finite(checkpoint.tensors))}))
        if main:
            self._save(checkpoint, "parts", write, FORMAT)
            return
        staging = self.folder / f".tmp-step-{checkpoint.step:08d}-parts"
        try:
            write(staging, checkpoint)
        except OSError as failure:
            raise disk_error(staging, failure) from None

    def _save(
        self, checkpoint: Checkpoint, by: str, write: Callable[[Path, Checkpoint], dict[str, Any]], version: int
    ) -> Path:
        """Stage with `write`, which tells what the manifest says of its files, as far as it knows; see `save`."""
        target = self.folder / f"step-{checkpoint.step:08d}"
        staging = self.folder / f".tmp-{target.name}-{by}"
        refuse_link(self.folder)
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
                sync_folder(self.folder.parent)  # what is made durable inside is lost without its folder's own name
            # All is written under a name that no reader takes for a checkpoint; a kill leaves only that, for `sweep`.
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            fault("checkpoint.staging")
            known = write(staging, checkpoint)
            write_json(staging / "state.json", finite(checkpoint.state))
            fault("checkpoint.file")
            # The manifest is last: it hashes the other files as they lie on the disk.
            files = {p.name: known.get(p.name) or described(p) for p in sorted(staging.iterdir())}
            write_json(staging / "manifest.json", {"format": version, "step": checkpoint.step, "files": files})
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
        manifest = read_record(path / "manifest.json", {"step": int, "format": int, "files": dict})
        for name in tensor_files(manifest["files"], manifest["format"]):
            check_safetensors(path / name)
        return Checkpoint(manifest["step"], Stored(path), read_record(path / "state.json", {}, limit=LARGEST_STATE))

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


def _write_whole(staging: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    for name in TENSOR_FILES:
        save_tensors(staging / f"{name}.safetensors", checkpoint.tensors[name])
        fault("checkpoint.file")
    return {}
