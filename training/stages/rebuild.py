"""The work of `posthoc_ema`: a finished denoiser with averaged weights of another length."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import CHECKPOINT, UserError
from training.guarding import read_json
from training.loop.power_ema import FOLDER, reconstruct, snapshots
from training.messages import answer, warn
from training.models.folders import find, whole_folder
from training.models.lineage import store_ingredients
from training.tensors import content_hash, load_tensors, save_tensors

if TYPE_CHECKING:
    import argparse

    from torch import Tensor


def rebuild(args: argparse.Namespace) -> int:
    """The work of `posthoc_ema`: a copy of a denoiser's final/ with the averaged weights of another length."""
    model, output = find(args.model, "denoiser"), Path(args.output)
    if not model.finished:
        raise UserError(f"{args.model}: no finished denoiser's run", hint="give its run folder", code=CHECKPOINT)
    with whole_folder(output) as staging:
        folder, end = model.home.parent / FOLDER, int(read_json(model.home.parent / "run.json")["step"])
        if strays := [path.name for number, path in snapshots(folder).items() if number > end]:
            warn(f"{', '.join(strays)} not used: the run ended at step {end} and gave up what it had been before")
        tensors, step = reconstruct(folder, args.length, args.step, end)
        _fill(staging, model.final, tensors)
    answer(f"wrote {output}: the average of length {args.length:g} at step {step}")
    return 0


def _fill(folder: Path, final: Path, tensors: Mapping[str, Tensor]) -> None:
    """A copy of `final` in `folder`, the averaged `tensors` in it."""
    shutil.copytree(final, folder, copy_function=shutil.copyfile)  # with the modes of new files
    for name, prefix, file in (
        ("denoiser", "denoiser.backbone.", folder / "model.safetensors"),
        ("adapter", "denoiser.adapter.", folder / "model.safetensors"),  # of one upon a base: all that there is
        ("text_encoder", "denoiser.text.", folder / "text_encoder" / "model.safetensors"),
    ):
        part = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if part:
            weights = load_tensors(file) | part
            save_tensors(file, weights, {"hash": content_hash(weights)})
            store_ingredients(folder, {name: content_hash(weights)})
