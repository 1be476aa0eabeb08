"""The weights of a folder as diffusers writes them: whole, in shards with an index, or a variant (fp16) of either."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from training.errors import CHECKPOINT, UserError
from training.guarding import read_record, refuse_link
from training.messages import note
from training.tensors import load_tensors

NAME = "diffusion_pytorch_model"
WEIGHTS = f"{NAME}.safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
PART = re.compile(r".*(-\d{5}-of-\d{5}\.safetensors|\.safetensors\.index(\.\w+)?\.json)")  # of weights in shards


def folder_weights(home: Path) -> dict[str, Tensor]:
    """Every tensor of `home`. Raises UserError saying what is there where that is not one set of safetensors."""
    if (home / WEIGHTS).is_file():
        return load_tensors(home / WEIGHTS)
    if (index := home / f"{WEIGHTS}.index.json").is_file():
        return _sharded(index)
    indices = sorted(home.glob("*.safetensors.index*.json"))
    files = [path for path in sorted(home.glob("*.safetensors")) if not PART.fullmatch(path.name)]
    if len(found := [*files, *indices]) == 1:
        note(f"{home} holds no {WEIGHTS}: {found[0].name} is read")
        return load_tensors(found[0]) if files else _sharded(indices[0])
    if found:
        reason = f"{home} holds no {WEIGHTS} but {' and '.join(path.name for path in found)}"
        hint = f"leave one of them in the folder, and move {' and '.join(path.name for path in found[1:])} elsewhere"
        raise UserError(reason, hint=hint, code=CHECKPOINT)
    if pickled := next((p.name for p in sorted(home.iterdir()) if p.suffix in PICKLES), None):
        reason = f"{home} holds {pickled}, a pickle, which is not read"
        raise UserError(reason, hint="where you trust it, save it with safe_serialization=True", code=CHECKPOINT)
    hint = "its variants (fp16) and its shards with their index are read, too"
    raise UserError(f"{home} holds no {WEIGHTS}", hint=hint, code=CHECKPOINT)


def _sharded(index: Path) -> dict[str, Tensor]:
    """The tensors that an index places in files beside it, every one of them."""
    places = read_record(index, {"weight_map": dict})["weight_map"]
    if odd := [name for name in places.values() if not isinstance(name, str) or Path(name).name != name]:
        reason = f"{index}: names a file outside its folder ({odd[0]!r:.80})"
        raise UserError(reason, hint="use another copy", code=CHECKPOINT)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        refuse_link(index.parent / name)
        tensors |= load_tensors(index.parent / name)
    if missing := sorted(places.keys() - tensors.keys()):
        reason = f"{index}: {missing[0]} is not in {places[missing[0]]}"
        raise UserError(reason, hint="download it again", code=CHECKPOINT)
    return tensors
