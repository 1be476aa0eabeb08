"""The work of `export_model`: a denoiser with all it draws with as one folder, its weights rounded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from training.guarding import make_folder
from training.messages import answer
from training.models.assembly import HashedPipeline, load_pipeline, networks
from training.models.autoencoders import autoencoder_hashes
from training.models.cards import keep_samples, measured, stored_facts
from training.models.folders import Found, export, find, whole_folder
from training.models.lineage import store_ingredients
from training.runs.folder import record
from training.settings import decoding
from training.tensors import in_dtype, save_tensors

if TYPE_CHECKING:
    import argparse


def export_model(args: argparse.Namespace) -> int:
    """A new model folder of a run or checkpoint, its weights stored as `args.dtype`. Returns the exit code."""
    output, source = Path(args.output), find(args.model, "denoiser")
    with whole_folder(output) as folder:
        pipeline = load_pipeline(source.home if source.finished else source.weights, "cpu", args.text_encoder)
        _write(folder, source, pipeline, getattr(torch, args.dtype))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    answer(f"wrote {output}: {size:,} bytes")
    return 0


def _write(folder: Path, source: Found, pipeline: HashedPipeline, dtype: torch.dtype) -> None:
    """final/ with other weights. The hashes are those of the rounded ones, in the precision they are loaded in."""
    autoencoder, backbone, text = pipeline.autoencoder, pipeline.denoiser.backbone, pipeline.text
    config, inner = source.config(), find(source.final / "autoencoder", "autoencoder").config()
    assert isinstance(config, decoding.DenoiserConfig) and isinstance(backbone, nn.Module)
    shutil.copytree(source.final, folder, copy_function=shutil.copyfile)  # with the modes of new files
    for network in (autoencoder, backbone, *([text] if text.trainable else [])):  # a frozen one is known by its hash
        network.load_state_dict(in_dtype(network.state_dict(), dtype))
    weights, hashes = {"weights": str(dtype).removeprefix("torch.")}, autoencoder_hashes(autoencoder)
    about = stored_facts(folder / "autoencoder") | weights | {"hashes": hashes}
    export(folder / "autoencoder", decoding.to_values(inner), autoencoder.state_dict(), about, dtype)
    hashes = pipeline.hashes | {"autoencoder": hashes["autoencoder"]} | networks(pipeline)
    store_ingredients(folder, hashes)
    told = stored_facts(folder) if source.finished else {}
    about = (told or facts_of_run(source, config.train.max_steps, folder)) | weights | {"hashes": hashes}
    export(folder, decoding.to_values(config), backbone.state_dict(), about, dtype)
    if text.trainable:
        make_folder(folder / "text_encoder")
        save_tensors(folder / "text_encoder" / "model.safetensors", in_dtype(text.state_dict(), dtype))


def facts_of_run(source: Found, last: int, folder: Path) -> dict[str, Any]:
    """What the run of a model, where it is of one, can say of a checkpoint, or of its `last` step before there were
    facts of a card; the pictures that it had drawn by then are put into `folder`."""
    step = last if source.finished else int(source.weights.name.rpartition("-")[2])
    run = source.final.parent
    told = record(run) if source.final.name == "final" else {}
    if not told:
        return {"steps": step}
    keep_samples(run, step, folder)
    data = {"index_sha256": told.get("data", {}).get("index_sha256")}
    return {"steps": step, "data": data, "numbers": measured(run, step), "versions": told.get("versions", {})}
