"""A checkpoint in parts: every process writes what it holds of tensors that are shared out, and reads what it will.

By torch.distributed.checkpoint, in files `shard-N-….safetensors`, one of each process: the other format of that package
holds pickles. Any number of processes reads them, one as well, and what is of no process alone is stored once.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import CHECKPOINT, UserError
from training.files import file_sha256
from training.machine.faults import fault
from training.tensors import check_safetensors, load_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILES = "shard-*.safetensors"


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor, in the tensor's own memory; all of one that is not shared out."""
    import torch
    from torch.distributed.tensor import DTensor

    with torch.no_grad():  # within a graph it would be a copy
        return value.to_local() if isinstance(value, DTensor) else value


def in_parts(folder: Path) -> bool:
    """Whether the checkpoint of a folder is in parts."""
    return any(folder.glob(FILES))


def described(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def write_parts(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Write, fsync and hash this process's parts; the manifest's lines for those of all processes. Collective.

    Raises OSError, in every process, where the disk of one refuses.
    """
    from torch import distributed
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    flat: dict[str, Any] = {f"{kind}/{name}": value for kind, part in tensors.items() for name, value in part.items()}
    try:
        save(flat, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as failure:  # no Exception: it would pass by whoever tells of one
        reasons = [reason for reason, _ in failure.failures.values()]
        raise next((r for r in reasons if isinstance(r, OSError)), RuntimeError(str(failure))) from None
    fault("checkpoint.file")
    own = folder.glob(FILES.replace("*", f"{distributed.get_rank() + 1:05d}-*"))
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, {file.name: described(file) for file in own})
    return {name: facts for part in every for name, facts in part.items()}


def sizes(folder: Path, kind: str) -> dict[str, torch.Size]:
    """The names of a kind, "model", "ema" or "optimizer", and the shapes of the whole tensors, in either layout."""
    if not in_parts(folder):
        return {name: value.shape for name, value in load_tensors(folder / f"{kind}.safetensors").items()}
    return {name: stored.size for name, stored in _stored(folder, kind).items()}


def read(folder: Path, kind: str) -> dict[str, Tensor]:
    """All tensors of a kind, whole, from a checkpoint in parts."""
    import torch

    stored = _stored(folder, kind)
    tensors = {name: torch.empty(part.size, dtype=part.properties.dtype) for name, part in stored.items()}
    _load(folder, kind, tensors)
    return tensors


def read_into(folder: Path, kind: str, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets`, which may be shared out: every one, and nothing else, in either layout. Not collective.

    Raises UserError naming the first that is missing, or that only the checkpoint has.
    """
    found = sizes(folder, kind)
    if different := [n for n in (*targets, *found) if n not in targets or found.get(n) != targets[n].shape]:
        what = f"{folder} does not fit its config: {kind} {different[0]}"
        raise UserError(what, hint="check that the config.json of the run belongs to it", code=CHECKPOINT)
    if in_parts(folder):
        return _load(folder, kind, targets)
    for name, value in load_tensors(folder / f"{kind}.safetensors").items():
        _take(targets[name], value)


def _take(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, or this process's part of it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor):  # no source: every process has the whole, and cuts out its own part
        value = local(distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None))
    local(target).copy_(value)


def _stored(folder: Path, kind: str) -> dict[str, Any]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    for file in folder.glob(FILES):
        check_safetensors(file)
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name.removeprefix(f"{kind}/"): part for name, part in stored.items() if name.startswith(f"{kind}/")}


def _load(folder: Path, kind: str, tensors: Mapping[str, Tensor]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    flat: dict[str, Any] = {f"{kind}/{name}": value.detach() for name, value in tensors.items()}
    with warnings.catch_warnings():  # of what is meant here: this process reads for itself alone
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            load(flat, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        except CheckpointException as failure:
            hint = "use --resume auto to take the newest sound one"
            reason = next(str(reason) for reason, _ in failure.failures.values())
            raise UserError(f"{folder}: cannot be read ({reason})", hint=hint, code=CHECKPOINT) from None
