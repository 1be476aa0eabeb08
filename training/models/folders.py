"""Model folders {config.json, model.safetensors, card.json, README.md}: found in a run, read, filled in, written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from training.errors import CHECKPOINT, UserError
from training.files import copy_file, write_json
from training.guarding import disk_error, make_folder, read_record, refuse_links, staged
from training.machine.faults import fault
from training.models.cards import stored_facts, write_card
from training.runs.checkpoints import Checkpoints
from training.runs.parts import in_parts
from training.settings import decoding
from training.settings.embedded import HUB, WANTED, located
from training.tensors import check_weights, content_hash, in_dtype, load_tensors, save_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def export(
    folder: Path,
    values: decoding.Values,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    stored: torch.dtype | None = None,
) -> str:
    """Write a model folder, whole, its card of the facts `about`; returns the weights' content hash.

    `stored`: the precision of floating-point numbers in the file, where it is another; they must fit into it.
    """
    identity = content_hash(tensors)
    make_folder(folder)
    try:
        fault("export")
    except OSError as failure:
        raise disk_error(folder, failure) from None
    written = in_dtype(tensors, stored) if stored else tensors
    save_tensors(folder / "model.safetensors", written, {"hash": identity})
    write_json(folder / "config.json", values)
    write_card(folder, {"parameters": sum(tensor.numel() for tensor in tensors.values()), **about})
    return identity


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A place for a folder to be made in, which becomes `output` once it is whole. Raises UserError where one is."""
    if output.exists():
        raise UserError(f"{output} already exists", hint="choose another --output")
    staging = staged(output)
    try:
        yield staging
        staging.replace(output)
    except OSError as failure:  # shutil's own error is a list of them
        raise disk_error(output, failure) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
        """Its config, decoded. Raises UserError with the file's name where it is none."""
        path = self.home / "config.json"
        try:
            return decoding.decode_stored(self.stage, read_record(path, {}))
        except UserError as problem:
            what = problem.what if str(path) in problem.what else f"{path}: {problem.what}"
            hint = "it was written by another version, or changed since; use another copy"
            raise UserError(what, hint=hint, code=CHECKPOINT) from None


def find(path: str | Path, stage: str | None = None) -> Found:
    """The model of RUN, RUN/final or a checkpoint; RUN in training gives its newest checkpoint. Names: see `located`.

    Raises UserError where there is no such model, or one of another stage than `stage`.
    """
    path = located(path, stage)
    if not path.is_dir():
        raise UserError(f"{path}: no such run", hint=WANTED, code=CHECKPOINT)
    in_checkpoints = path.parent.name == "checkpoints"
    refuse_links(path.parent.parent if in_checkpoints else path)
    if in_checkpoints and ((path / "ema.safetensors").is_file() or in_parts(path)):
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
    values = read_record(home / "config.json", {})
    kind = "autoencoder" if "model" in values else "denoiser"
    if kind != (stage or kind):
        raise UserError(
            f"{path} is a run of the {kind} stage, expected {stage}",
            hint=f"give the folder of the {stage}",
            code=CHECKPOINT,
        )
    return Found(home, weights, kind)


def name_of(path: str | Path) -> str:
    """What a model is called: the name of its run's or exported folder, or repository, without what is above."""
    if str(path).startswith(HUB):
        return str(path).rpartition("/")[2]
    folder = Path(os.path.abspath(located(path)))
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    return folder.parent.name if folder.name == "final" else folder.name


def weights(file: Path, name: str) -> dict[str, Tensor]:
    """The tensors of network `name` from an exported file or, averaged where they are, from a checkpoint folder."""
    if file.is_file():
        return load_tensors(file)
    checkpoint = Checkpoints(file.parent.parent).load(file)
    tensors = {**checkpoint.tensors["model"], **checkpoint.tensors["ema"]}
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def fill(model: torch.nn.Module, tensors: Mapping[str, Tensor], source: Path, *, assign: bool = False) -> None:
    """Load weights, every one of them and nothing else. Raises UserError naming the first that does not fit."""
    check_weights(tensors, model.state_dict(), source)
    try:
        model.load_state_dict(dict(tensors), assign=assign)
    except RuntimeError as failure:
        reason = str(failure).splitlines()[1].strip() if "\n" in str(failure) else str(failure)
        raise UserError(
            f"{source} does not fit its config: {reason[:300]}",
            hint="check that the config.json beside it belongs to it",
            code=CHECKPOINT,
        ) from None


def copy_model(source: Path, target: Path) -> None:
    """Copy a model folder (final/ of a run) whole, but for the pictures of its card, which are of the data."""
    make_folder(target)
    for name in ("config.json", "model.safetensors", "README.md"):
        if (source / name).is_file():
            copy_file(source / name, target / name)
    if facts := stored_facts(source):
        write_card(target, facts)
