"""The work of `export_model`: a denoiser with all it draws with as one folder, its weights rounded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ldm.adapters.controlled import Controlled
from ldm.adapters.low_rank import plain_state
from ldm.text.encoders import ScratchTextEncoder
from training.errors import UserError
from training.guarding import make_folder
from training.messages import answer
from training.models.adapters import refuse_adapter
from training.models.assembly import HashedPipeline, backbone_for, load_pipeline, networks
from training.models.autoencoders import autoencoder_hashes
from training.models.cards import keep_samples, measured, stored_facts
from training.models.folders import Found, export, find, whole_folder
from training.models.lineage import store_ingredients
from training.models.text_encoders import keep_vocabulary, stored_vocabulary, vocabulary_hash
from training.runs.folder import record
from training.settings import decoding
from training.tensors import in_dtype, save_tensors

if TYPE_CHECKING:
    import argparse


def export_model(args: argparse.Namespace) -> int:
    """A new model folder of a run or checkpoint, its weights stored as `args.dtype`. Returns the exit code."""
    output, source = Path(args.output), find(args.model, "denoiser")
    refuse_adapter(args.model, source, "give its base, and --adapter with this run: both become one model")
    with whole_folder(output) as folder:
        place = source.home if source.finished else source.weights
        pipeline = load_pipeline(place, "cpu", args.text_encoder, adapters=args.adapter)
        pipeline = as_one(source, pipeline) if args.adapter else pipeline
        _write(folder, source, pipeline, getattr(torch, args.dtype))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    answer(f"wrote {output}: {size:,} bytes")
    return 0


def as_one(source: Found, pipeline: HashedPipeline) -> HashedPipeline:
    """A pipeline with what its adapters have learned written into weights and words of its own: sums in float32.

    Raises UserError for adapters that are networks beside the denoiser.
    """
    config, denoiser, text = source.config(), pipeline.denoiser, pipeline.text
    assert isinstance(config, decoding.DenoiserConfig) and isinstance(denoiser.backbone, nn.Module)
    if isinstance(denoiser.backbone, Controlled):
        what = "a control is a network of its own beside the denoiser's, and cannot become one with it"
        raise UserError(what, hint="leave it out of --adapter, and give it to generate with --control")
    if isinstance(text, ScratchTextEncoder):
        learned = plain_state(text) | {"words.weight": text.table()}
        text = config.text.build(text.tokenizer.to_json())
        text.load_state_dict(learned)
    backbone = backbone_for(config, pipeline.autoencoder, text)
    backbone.load_state_dict(plain_state(denoiser.backbone))
    hashes = {name: value for name, value in pipeline.hashes.items() if not name.startswith("adapter-")}
    whole = replace(pipeline, denoiser=replace(denoiser, backbone=backbone.eval()), text=text.eval(), hashes=hashes)
    return replace(whole, hashes=hashes | networks(whole))


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
    if isinstance(text, ScratchTextEncoder):
        keep_vocabulary(text.tokenizer.to_json(), folder)
    hashes = pipeline.hashes | {"autoencoder": hashes["autoencoder"]} | networks(pipeline)
    if "vocabulary" in hashes:
        hashes["vocabulary"] = vocabulary_hash(stored_vocabulary(folder))
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
