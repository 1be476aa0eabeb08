"""Run folders: what a run is made from, where it stands, what it exports, and how any later step loads it."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training import config as configs
from training.checkpoint import Checkpoints
from training.errors import CHECKPOINT, DISK, UserError
from training.faults import fault
from training.files import (
    PARTIAL,
    content_hash,
    disk_error,
    hold,
    load_tensors,
    read_json,
    remove_partials,
    save_tensors,
    sync_folder,
    write_bytes,
    write_json,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from autoencoder.base import Autoencoder

# Keys that may change between a run and its resumption; everything else is part of what the run is.
MUTABLE = {
    f"train.{key}"
    for key in (
        "max_steps",
        "micro_batch_size",
        "num_workers",
        "compile",
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
MUTABLE_SECTIONS = {"sample", "sampler", "grid", "guidance"}
# What run.json may hold besides stage, status and step, as far as it is read again.
KINDS = {**dict.fromkeys(("versions", "environment", "data", "hashes", "teacher", "vision"), dict), "resumes": list}


class Run:
    """A run folder being written by this program."""

    def __init__(
        self, folder: Path, stage: str, config: configs.Config, resume: str | None, *, other_batch: bool = False
    ) -> None:
        """Claim `folder`; `other_batch` allows another global batch than the run's.

        Raises UserError where it is a file, in use, another run, or one not asked to be resumed.
        """
        self.folder, self.stage, self.config = folder, stage, config
        self.mutable = MUTABLE | ({"train.batch_size"} if other_batch else set())
        self.resumes: list[dict[str, Any]] = []
        self.environment: dict[str, Any] = {}
        values = configs.to_values(config)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file", hint="choose another --output", code=DISK)
        if old := record(folder):
            self._same(old, values, resume)
        elif folder.is_dir() and not _barely_begun(folder, values):
            raise UserError(f"{folder} is not empty and holds no run", hint="choose another --output", code=CHECKPOINT)
        try:
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                sync_folder(folder.parent)
            self.lock = hold(folder)
            remove_partials(folder)
        except OSError as failure:
            raise disk_error(folder, failure) from None

    def _same(self, old: dict[str, Any], values: configs.Values, resume: str | None) -> None:
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
        before = configs.to_values(configs.decode(self.stage, read_json(self.folder / "config.json")))
        changes = configs.diff(before, values)
        fixed = [
            c
            for c in changes
            if (key := c.partition(":")[0]) not in self.mutable and key.partition(".")[0] not in MUTABLE_SECTIONS
        ]
        if fixed:
            raise UserError(
                "the config differs from the run's:\n       " + "\n       ".join(fixed),
                hint=f"repeat the run's own with --config {self.folder}/config.json, or use another --output",
                code=CHECKPOINT,
            )
        for change in changes:
            print(f"note: {change}", file=sys.stderr)

    def describe(self, status: str, step: int, facts: Mapping[str, Any]) -> None:
        """Write config.json and run.json: versions, hashes and where the run stands."""
        stands = {"format": 1, "stage": self.stage, "status": status, "step": step}
        made_with = {"versions": versions(), "environment": self.environment, "resumes": self.resumes}
        write_json(self.folder / "config.json", configs.to_values(self.config))
        write_json(self.folder / "run.json", {**stands, **made_with, **facts})

    def went_on(self, step: int, environment: Mapping[str, Any]) -> None:
        """Note what this part of the run is computed with; a resume at `step` with something else is said aloud."""
        self.environment = dict(environment)
        old = record(self.folder)
        self.resumes = list(old.get("resumes", []))
        before = {**old.get("versions", {}), **old.get("environment", {})}
        changed = [
            f"{name} {before[name]} -> {value}"
            for name, value in {**versions(), **environment}.items()
            if before.get(name, value) != value
        ]
        if step and changed:
            self.resumes.append({"step": step, "changed": changed})
            print(f"warning: bit-exactness is not guaranteed across {', '.join(changed)}", file=sys.stderr)

    def same_ingredients(self, facts: Mapping[str, Any]) -> None:
        """Refuse to go on with other data or frozen parts than before. Raises UserError naming both hashes."""
        old = record(self.folder)
        for group, known in facts.items():
            for name, value in known.items():
                if (before := old.get(group, {}).get(name, value)) != value:
                    raise UserError(
                        f"this run was made with {group} {name} {str(before)[:12]}, now given {value[:12]}",
                        hint="give what the run began with, or start another from its weights with --init-from",
                        code=CHECKPOINT,
                    )

    def leave(self) -> None:
        """Give the folder back."""
        self.lock.truncate(0)
        self.lock.close()

    def finished(self) -> bool:
        """Whether the run has exported its last step, as far as its config asks now."""
        old = record(self.folder)
        return bool(old) and old["status"] == "finished" and bool(old["step"] >= self.config.train.max_steps)


def record(folder: Path) -> dict[str, Any]:
    """What a run's run.json holds; empty where there is none. Raises UserError where it is no record of a run."""
    path = folder / "run.json"
    if not path.is_file():
        return {}
    old = read_json(path)
    if isinstance(old, dict):
        kinds = {"stage": str, "status": str, "step": int, **{key: KINDS[key] for key in KINDS.keys() & old.keys()}}
        if all(isinstance(old.get(key), kind) for key, kind in kinds.items()):
            return old
    raise UserError(f"{path}: is not the record of a run", hint="use another --output", code=CHECKPOINT)


def _barely_begun(folder: Path, values: configs.Values) -> bool:
    """Whether nothing lies there but what a run of these values leaves when killed before its run.json."""
    names = {p.name for p in folder.iterdir() if p.suffix != PARTIAL} - {".lock"}
    return not names or (names == {"config.json"} and read_json(folder / "config.json") == values)


def versions() -> dict[str, str]:
    """What the numbers of a run may depend on."""
    known = {}
    for package in ("torch", "torchvision", "transformers", "accelerate", "lpips", "numpy"):
        known[package] = metadata.version(package)
    return {"python": platform.python_version(), **known}


def export(folder: Path, values: configs.Values, tensors: Mapping[str, Tensor], card: str) -> str:
    """Write a model folder {config.json, model.safetensors, README.md}, whole; returns the weights' content hash."""
    identity = content_hash(tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fault("export")
    except OSError as failure:
        raise disk_error(folder, failure) from None
    save_tensors(folder / ".tmp-model.safetensors", tensors, {"hash": identity})
    (folder / ".tmp-model.safetensors").replace(folder / "model.safetensors")
    write_json(folder / "config.json", values)
    write_bytes(folder / "README.md", card.encode())
    return identity


def find(path: str | Path, stage: str) -> tuple[Path, Path]:
    """(folder of config.json, file of weights) of RUN, RUN/final or a checkpoint; RUN in training gives its newest one.

    Raises UserError where there is no such model, or one of another stage.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such run", hint="give a run folder, its final/ or one of its checkpoints", code=CHECKPOINT
        )
    if path.parent.name == "checkpoints" and (path / "ema.safetensors").is_file():
        home, weights = path.parent.parent, path
    elif (path / "model.safetensors").is_file() and (path / "config.json").is_file():
        home, weights = path, path / "model.safetensors"
    elif (path / "final" / "model.safetensors").is_file():
        home, weights = path / "final", path / "final" / "model.safetensors"
    else:
        newest = Checkpoints(path).newest()
        if newest is None:
            raise UserError(
                f"{path}: holds no model and no checkpoint",
                hint="give a run folder, its final/ or one of its checkpoints",
                code=CHECKPOINT,
            )
        home, weights = path, newest
    values = read_json(home / "config.json")
    found = "autoencoder" if "model" in values else "denoiser"
    if found != stage:
        raise UserError(
            f"{path} is a run of the {found} stage, expected {stage}",
            hint=f"give the folder of the {stage}",
            code=CHECKPOINT,
        )
    return home, weights


def weights(file: Path, name: str) -> dict[str, Tensor]:
    """The tensors of network `name` from an exported file or, averaged where they are, from a checkpoint folder."""
    if file.is_file():
        return load_tensors(file)
    checkpoint = Checkpoints(file.parent.parent).load(file)
    tensors = {**checkpoint.tensors["model"], **checkpoint.tensors["ema"]}
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def load_autoencoder(path: str | Path, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder of a run (averaged weights), frozen, in eval mode."""
    home, file = find(path, "autoencoder")
    settings = configs.decode("autoencoder", read_json(home / "config.json"))
    assert isinstance(settings, configs.AutoencoderConfig)
    model: Autoencoder = settings.model.build()
    fill(model, weights(file, "autoencoder"), file)
    return model.to(device).eval().requires_grad_(False)


def fill(model: torch.nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load weights, every one of them and nothing else. Raises UserError naming the first that does not fit."""
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as failure:
        reason = str(failure).splitlines()[1].strip() if "\n" in str(failure) else str(failure)
        raise UserError(
            f"{source} does not fit its config: {reason[:300]}",
            hint="is the config.json beside it its own?",
            code=CHECKPOINT,
        ) from None


def copy_model(source: Path, target: Path) -> None:
    """Copy a model folder (final/ of a run) whole."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", "README.md"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def autoencoder_hashes(model: Autoencoder) -> dict[str, str]:
    """`encoder`: what latents depend on; `autoencoder`: what pictures depend on (decoder and normaliser too)."""
    return {"encoder": content_hash(model.encoder_state()), "autoencoder": content_hash(model.state_dict())}


def card(title: str, facts: Mapping[str, Any], values: configs.Values) -> str:
    """A model card: what it is, its numbers, and the config that repeats it. Text from outside is fenced or escaped."""
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items())
    return f"# {title}\n\n| | |\n| --- | --- |\n{rows}\n\nConfig:\n\n```json\n{json.dumps(values, indent=1)}\n```\n"


def _cell(value: Any) -> str:
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "|<>[]`*_\\" else c for c in text)
