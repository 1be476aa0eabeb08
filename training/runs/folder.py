"""Run folders: what a run is made from, where it stands, what it exports, and how any later step loads it."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from training.errors import CHECKPOINT, DISK, UserError
from training.files import finite, hold, remove_partials, sync_folder, write_json
from training.guarding import PARTIAL, disk_error, read_json, refuse_link, refuse_links
from training.messages import note, warn
from training.runs.ingredients import difference
from training.settings import decoding
from training.settings.upon import learned_upon

# Keys that may change between a run and its resumption; everything else is part of what the run is.
MUTABLE = {"model.gradient_checkpointing", "backbone.gradient_checkpointing"} | {
    f"train.{key}"
    for key in (
        "max_steps",
        "micro_batch_size",
        "num_workers",
        "compile",
        "sharding",
        "tf32",
        "cudnn_benchmark",
        "log_every",
        "save_every",
        "save_async",
        "keep_last",
        "keep_best",
        "spike_factor",
        "sample_every",
        "validation_size",
    )
}
# Those that leave the networks as they are, so that another run can begin from their weights.
SAME_WEIGHTS = {"optimizer", "train", "loss", "conditioning", "times", "weighting", "pairing", "discriminator"}
MUTABLE_SECTIONS = {"sample", "sampler", "grid", "guidance"}
# What run.json may hold besides stage, status and step, as far as it is read again.
KINDS = {**dict.fromkeys(("versions", "environment", "data", "hashes", "teacher", "vision"), dict), "resumes": list}
KINDS["ledger"] = dict
# What the environment was in a run.json that does not name it.
LATER = {"tf32": False, "cudnn_benchmark": False, "sharding": "none"}


LEFT_BY_A_START = (
    *("config.json", "run.json", "metrics.jsonl", "timing.jsonl", "final", "samples", "ema"),
    *("tensorboard", "trackers.json", "report.html"),
)
REPLACED = "replaced"  # where they go when a run without a checkpoint begins anew


class RunView:
    """A run folder as the processes see it that do not write it: its place, and what it is."""

    def __init__(self, folder: Path, stage: str, config: decoding.Config) -> None:
        self.folder, self.stage, self.config = folder, stage, config

    def finished(self) -> bool:
        """Whether the run has exported its last step, as far as its config asks now."""
        old = record(self.folder)
        return bool(old) and old["status"] == "finished" and bool(old["step"] >= self.config.train.max_steps)


class Run(RunView):
    """A run folder being written by this program."""

    def __init__(
        self, folder: Path, stage: str, config: decoding.Config, resume: str | None, *, other_batch: bool = False
    ) -> None:
        """Claim `folder`; `other_batch` allows another global batch than the run's.

        Raises UserError where it is a file, in use, another run, one not asked to be resumed, or has links out of it.
        """
        super().__init__(folder, stage, config)
        self.before: decoding.Config | None = None  # the config of the run that goes on
        self.mutable = MUTABLE | ({"train.batch_size"} if other_batch else set())
        self.resumes: list[dict[str, Any]] = []
        self.environment: dict[str, Any] = {}
        self.outlook: dict[str, Any] = {}  # epochs, parameters, disk: what was said before the first step
        values = decoding.to_values(config)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file", hint="choose another --output", code=DISK)
        refuse_links(folder)
        old = record(folder)
        anew = bool(old) and old["stage"] == stage and resume in (None, "auto") and not _saved(folder, old)
        if old and not anew:
            self._same(old, values, resume)
        elif not old and folder.is_dir() and not _barely_begun(folder, values):
            raise UserError(f"{folder} is not empty and holds no run", hint="choose another --output", code=CHECKPOINT)
        try:
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                sync_folder(folder.parent)
            self.lock = hold(folder)
            remove_partials(folder)
            if anew:
                self._set_aside(old)
        except OSError as failure:
            raise disk_error(folder, failure) from None

    def _set_aside(self, old: Mapping[str, Any]) -> None:
        """Begin anew where a start was refused, or died, before its first checkpoint: whatever it was, goes aside."""
        aside = self.folder / REPLACED
        shutil.rmtree(aside, ignore_errors=True)  # of the beginning before that one
        aside.mkdir()
        moved = [name for name in LEFT_BY_A_START if (self.folder / name).exists()]
        for name in moved:
            (self.folder / name).replace(aside / name)
        note(
            f"{self.folder} was begun before (status {old['status']}, step {old['step']}) and holds no checkpoint: "
            f"begun anew; what it held ({', '.join(moved)}) is in {aside}"
        )

    def _same(self, old: dict[str, Any], values: decoding.Values, resume: str | None) -> None:
        if old["stage"] != self.stage:
            raise UserError(
                f"{self.folder} holds a run of the {old['stage']} stage",
                hint="choose another --output",
                code=CHECKPOINT,
            )
        if not resume:
            raise UserError(
                f"{self.folder} already holds a run",
                hint="use --resume auto to go on with it, or another --output",
                code=CHECKPOINT,
            )
        # Decoded, so that keys newer than the run stand at their defaults.
        self.before = decoding.decode_stored(self.stage, read_json(self.folder / "config.json"))
        changes = decoding.diff(decoding.to_values(self.before), values)
        conflicts = [
            c
            for c in changes
            if (key := c.partition(":")[0]) not in self.mutable and key.partition(".")[0] not in MUTABLE_SECTIONS
        ]
        if conflicts:
            raise UserError(
                "the config differs from the run's:\n       " + "\n       ".join(conflicts),
                hint=self._way_out(conflicts),
                code=CHECKPOINT,
            )
        for change in changes:
            note(f"{change}")

    def _way_out(self, conflicts: list[str]) -> str:
        """How to go on where a resume asks for another config than the run's."""
        own = f"repeat the run's own with --config {shlex.quote(str(self.folder / 'config.json'))}"
        same_weights = {conflict.partition(".")[0] for conflict in conflicts} <= SAME_WEIGHTS
        if same_weights and not self.begins_with_another():
            weights = f"--init-from {shlex.quote(str(self.folder))} --output NEW"
            return f"{own}; or begin another run from its weights: {weights}"
        return f"{own}, or use another --output"

    def begins_with_another(self) -> bool:
        """Whether it is learned upon, or from, a model that it begins with, so that no --init-from can be given."""
        return learned_upon(self.config) or (self.stage == "denoiser" and "teacher" in record(self.folder))

    def describe(self, status: str, step: int, facts: Mapping[str, Any]) -> None:
        """Write config.json and run.json: versions, hashes and where the run stands."""
        stands = {"format": 1, "stage": self.stage, "status": status, "step": step}
        made_with = {"versions": versions(), "environment": self.environment, "resumes": self.resumes}
        made_with |= {"outlook": self.outlook} if self.outlook else {}
        made_with |= {key: value for key, value in record(self.folder).items() if key == "ledger"}  # until its next end
        write_json(self.folder / "config.json", decoding.to_values(self.config))
        write_json(self.folder / "run.json", finite({**stands, **made_with, **facts}))

    def note_environment(self, step: int, environment: Mapping[str, Any]) -> None:
        """Note what this part of the run is computed with; a resume at `step` with something else is said aloud."""
        self.environment = dict(environment)
        old = record(self.folder)
        self.resumes = list(old.get("resumes", []))
        before = {**LATER, **old.get("versions", {}), **old.get("environment", {})}
        differences = [
            f"{name} {before[name]} -> {value}"
            for name, value in {**versions(), **environment}.items()
            if before.get(name, value) != value
        ]
        if step and differences:
            self.resumes.append({"step": step, "changed": differences})
            warn(f"bit-exactness is not guaranteed across {', '.join(differences)}")

    def same_ingredients(self, facts: Mapping[str, Any]) -> None:
        """Refuse to go on with other data or frozen parts than before. Raises UserError naming both hashes."""
        old = record(self.folder)
        hint = "give what the run began with, or start another from its weights with --init-from"
        if self.begins_with_another():
            hint = "give what the run began with, or begin another with --output"
        for group, identities in facts.items():
            if change := difference(old.get(group, {}), identities):
                what = f"this run was made with {group} {change.name} {change.before}, now given {change.now}"
                raise UserError(what, hint=hint, code=CHECKPOINT)

    def leave(self) -> None:
        """Give the folder back."""
        self.lock.truncate(0)
        self.lock.close()


def record(folder: Path) -> dict[str, Any]:
    """What a run's run.json holds; empty where there is none. Raises UserError where it is no record of a run."""
    path = folder / "run.json"
    if not path.is_file():
        return {}
    refuse_link(path)
    old = read_json(path)
    if isinstance(old, dict):
        kinds = {"stage": str, "status": str, "step": int, **{key: KINDS[key] for key in KINDS.keys() & old.keys()}}
        if all(isinstance(old.get(key), kind) for key, kind in kinds.items()):
            return old
    raise UserError(f"{path}: is not the record of a run", hint="use another --output", code=CHECKPOINT)


def logged(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl or timing.jsonl; None for what is no JSON object with a step, as a line cut off."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _saved(folder: Path, old: Mapping[str, Any]) -> bool:
    """Whether a run has anything that training made: a checkpoint, sound or not, or its export."""
    exported = (folder / "final" / "model.safetensors").exists() or old["status"] == "finished"
    return exported or any((folder / "checkpoints").glob("step-*"))


def _barely_begun(folder: Path, values: decoding.Values) -> bool:
    """Whether nothing lies there but what a run of these values leaves when killed before its run.json."""
    names = {p.name for p in folder.iterdir() if p.suffix != PARTIAL} - {".lock"}
    return not names or (names == {"config.json"} and read_json(folder / "config.json") == values)


def versions() -> dict[str, str]:
    """What the numbers of a run may depend on."""
    packages = {}
    for package in ("torch", "torchvision", "transformers", "accelerate", "lpips", "numpy"):
        packages[package] = metadata.version(package)
    return {"python": platform.python_version(), **packages}
