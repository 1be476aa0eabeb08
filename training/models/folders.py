"""Model folders {config.json, model.safetensors, README.md}: found in a run, read, filled in, written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from training.errors import CHECKPOINT, UserError
from training.files import content_hash, disk_error, load_tensors, read_json, save_tensors, write_bytes, write_json
from training.machine.faults import fault
from training.runs.checkpoints import Checkpoints
from training.settings import decoding

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def export(folder: Path, values: decoding.Values, tensors: Mapping[str, Tensor], card: str) -> str:
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


class Found(NamedTuple):
    """A model on disk: the folder of its config.json; its weights, exported file or checkpoint folder; its stage."""

    home: Path
    weights: Path
    stage: str

    @property
    def final(self) -> Path:
        """The folder of what does not change in training: final/ of a run, or the exported folder itself."""
        return self.home if self.weights == self.home / "model.safetensors" else self.home / "final"

    @property
    def finished(self) -> bool:
        """Whether the weights are exported ones."""
        return self.weights.is_file()

    def config(self) -> decoding.Config:
        """Its config, decoded."""
        return decoding.decode_stored(self.stage, read_json(self.home / "config.json"))


WANTED = "give a run folder, its final/ or one of its checkpoints"


def find(path: str | Path, stage: str | None = None) -> Found:
    """The model of RUN, RUN/final or a checkpoint; RUN in training gives its newest checkpoint.

    Raises UserError where there is no such model, or one of another stage than `stage`.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such run", hint=WANTED, code=CHECKPOINT)
    if path.parent.name == "checkpoints" and (path / "ema.safetensors").is_file():
        home, weights = path.parent.parent, path
    elif (path / "model.safetensors").is_file() and (path / "config.json").is_file():
        home, weights = path, path / "model.safetensors"
    elif (path / "final" / "model.safetensors").is_file():
        home, weights = path / "final", path / "final" / "model.safetensors"
    else:
        newest = Checkpoints(path).newest()
        if newest is None:
            raise UserError(f"{path}: holds no model and no checkpoint", hint=WANTED, code=CHECKPOINT)
        home, weights = path, newest
    values = read_json(home / "config.json")
    kind = "autoencoder" if "model" in values else "denoiser"
    if kind != (stage or kind):
        raise UserError(
            f"{path} is a run of the {kind} stage, expected {stage}",
            hint=f"give the folder of the {stage}",
            code=CHECKPOINT,
        )
    return Found(home, weights, kind)


def weights(file: Path, name: str) -> dict[str, Tensor]:
    """The tensors of network `name` from an exported file or, averaged where they are, from a checkpoint folder."""
    if file.is_file():
        return load_tensors(file)
    checkpoint = Checkpoints(file.parent.parent).load(file)
    tensors = {**checkpoint.tensors["model"], **checkpoint.tensors["ema"]}
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def fill(model: torch.nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load weights, every one of them and nothing else. Raises UserError naming the first that does not fit, is of
    another kind of number or is not finite."""
    for name, wanted in model.state_dict().items():
        if name in tensors and (wrong := _unfit(tensors[name], wanted)):
            hint = "give another copy or checkpoint: these weights are damaged, or were made for another program"
            raise UserError(f"{source}: tensor {name} {wrong}", hint=hint, code=CHECKPOINT)
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as failure:
        reason = str(failure).splitlines()[1].strip() if "\n" in str(failure) else str(failure)
        raise UserError(
            f"{source} does not fit its config: {reason[:300]}",
            hint="check that the config.json beside it belongs to it",
            code=CHECKPOINT,
        ) from None


def _unfit(tensor: Tensor, wanted: Tensor) -> str:
    """Why a tensor cannot stand for `wanted`, of whatever precision; empty where it can."""
    if tensor.is_floating_point() != wanted.is_floating_point() or tensor.is_complex() or wanted.is_complex():
        return f"is {str(tensor.dtype).removeprefix('torch.')}, not {_kind(wanted)}"
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        return f"is not finite ({int((~tensor.isfinite()).sum()):,} of its {tensor.numel():,} numbers)"
    return ""


def _kind(tensor: Tensor) -> str:
    return "floating-point numbers" if tensor.is_floating_point() else "whole numbers"


def copy_model(source: Path, target: Path) -> None:
    """Copy a model folder (final/ of a run) whole."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", "README.md"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def card(title: str, facts: Mapping[str, Any], values: decoding.Values) -> str:
    """A model card: what it is, its numbers, and the config that repeats it. Text from outside is fenced or escaped."""
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items())
    return f"# {title}\n\n| | |\n| --- | --- |\n{rows}\n\nConfig:\n\n```json\n{json.dumps(values, indent=1)}\n```\n"


def _cell(value: Any) -> str:
    text = " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "|<>[]`*_\\" else c for c in text)
