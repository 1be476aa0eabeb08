"""The work of `convert_denoiser import`: another program's denoiser, with all that it draws with, as a model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autoencoder.base import Autoencoder
from ldm.text import HuggingFace, TextEncoder
from ldm.text.huggingface import HuggingFaceTextEncoder
from training.commands import door
from training.errors import CHECKPOINT, UserError, as_user_error
from training.exchange.autoencoders import Imported, keep_autoencoder
from training.exchange.denoiser_sources import Asked, Donor, download, read_folder
from training.exchange.single_file_import import fill_text, read_file
from training.ledger import Ledger
from training.messages import note
from training.models import text_encoders
from training.models.assembly import draw_with, networks
from training.models.autoencoders import autoencoder_hashes, finished_autoencoder, load_autoencoder
from training.models.folders import copy_model, export, fill, whole_folder
from training.models.lineage import BEGUN_WITH, store_ingredients
from training.next_step import beside
from training.settings import decoding
from training.tensors import save_tensors

ORIGIN = "Taken from another program's checkpoint; not trained here."
WANTED = "check that config.json is complete and belongs to these weights"


def import_denoiser(source: str, output: Path, text_encoder: str = "", autoencoder: str = "",
                    prediction: str | None = None, heads: int | None = None) -> str:  # fmt: skip
    """Read `source` (a diffusers pipeline's folder, one network's, a repository's name or a single safetensors file)
    and write it as a model folder that every later step takes for a finished run. Returns the command to draw with it.

    What it lacks is given: `text_encoder` (NAME or DIR), `autoencoder` (a run), `prediction`, `heads` of a single file.
    Raises UserError for what has no counterpart here; what is guessed, replaced or ignored is said, and is in the card.
    """
    if heads is not None and heads < 1:
        raise UserError(f"--heads: must be at least 1 (got {heads})")
    path = Path(source) if Path(source).exists() else download(source)
    asked, ledger = Asked(text_encoder, autoencoder, prediction, heads), Ledger()
    with whole_folder(output) as folder:
        donor = read_file(path, asked, ledger) if path.is_file() else read_folder(path, asked, ledger)
        _write(folder, donor, ledger, source)
        held = donor.network.labels is not None or text_encoders.stored_identity(folder)["copied"]
    for line in ledger.lines():
        note(line)
    beside_it = [] if held else ["--text-encoder", donor.encoder]  # large, and so kept by its hash alone
    prompt = next(iter(donor.classes), "a photo")
    pictures = beside(output, "pictures")
    return door("generate", "--model", output, "--prompt", prompt, "--output", pictures, *beside_it)


def _write(folder: Path, donor: Donor, ledger: Ledger, source: str) -> None:
    """The parts of a run's final/, each checked against the others."""
    network, autoencoder = donor.network, _autoencoder(donor.autoencoder, folder, source)
    if network.channels != autoencoder.latent_channels:
        reason = f"{source}: its network is of {network.channels} latent channels, the autoencoder of "
        hint = "give the one it was trained with: --autoencoder RUN"
        raise UserError(f"{reason}{autoencoder.latent_channels}", hint=hint, code=CHECKPOINT)
    config = _config(donor, (network.size * autoencoder.factor,) * 2, source)
    text, hashes = _text(config, donor, folder, source)
    with torch.device("meta"):
        built = config.backbone.build(
            channels=network.channels, context_dim=text.context_dim, pooled_dim=text.pooled_dim
        )
    _check_names(built.state_dict(), network.tensors, source)
    fill(built, network.tensors, Path(source), assign=True)
    hashes |= {"autoencoder": autoencoder_hashes(autoencoder)["autoencoder"]}
    with as_user_error("say what the network predicts: --prediction v", CHECKPOINT):
        pipeline = draw_with(config, autoencoder, built.eval(), text, hashes)
    hashes = {name: hashes[name] for name in BEGUN_WITH if name in hashes} | networks(pipeline)
    store_ingredients(folder, hashes)
    about = {"origin": ORIGIN, "taken": ledger.report(), "hashes": hashes}
    export(folder, decoding.to_values(config), built.state_dict(), about)


def _check_names(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], source: str) -> None:
    """Raises UserError naming the first tensor that is missing or is left over."""
    if missing := sorted(own.keys() - given.keys()):
        more = f" and {len(missing) - 1} more are" if missing[1:] else " is"
        raise UserError(f"{source}: tensor {missing[0]}{more} missing", hint="is it complete?", code=CHECKPOINT)
    if left := sorted(given.keys() - own.keys()):
        more = f" and {len(left) - 1} more have" if left[1:] else " has"
        hint = "the weights are of another network than config.json or the other tensors describe"
        raise UserError(f"{source}: tensor {left[0]}{more} no place", hint=hint, code=CHECKPOINT)


def _autoencoder(donor: Imported | str, folder: Path, source: str) -> Autoencoder:
    """Stage one as `folder`/autoencoder: the source's own, or the run that was given."""
    if isinstance(donor, Imported):
        return keep_autoencoder(donor, Path(source), folder / "autoencoder")
    copy_model(finished_autoencoder(donor), folder / "autoencoder")
    return load_autoencoder(folder / "autoencoder")


def _config(donor: Donor, size: tuple[int, int], source: str) -> decoding.DenoiserConfig:
    """The config of what was read; what it says of training are the defaults. Raises UserError where it is none."""
    process = donor.process
    values: dict[str, Any] = {
        "backbone": donor.network.backbone, "text": donor.text, "schedule": process.schedule,
        "prediction": process.prediction, "sampler": process.sampler, "grid": process.grid,
        "sample": {"steps": donor.steps, "size": size},
        "guidance": {"kind": "classifier-free", "scale": donor.guidance},
    }  # fmt: skip
    if process.schedule["kind"] != "flow":
        values["times"] = {"kind": "uniform"}
    try:
        config = decoding.decode("denoiser", values)
    except UserError as problem:
        raise UserError(f"{source}: {problem.what}", hint=WANTED, code=CHECKPOINT) from None
    assert isinstance(config, decoding.DenoiserConfig)
    return config


def _text(config: decoding.DenoiserConfig, donor: Donor, folder: Path,
          source: str) -> tuple[TextEncoder, dict[str, str]]:  # fmt: skip
    """The text encoder as `folder` keeps it, and the hash of its words. Raises UserError where it does not fit."""
    network = donor.network
    if network.labels is not None:
        return _labels(config, donor, folder)
    assert isinstance(config.text, HuggingFace)
    try:
        text = text_encoders.load_huggingface(config.text, donor.encoder)
    except UserError as problem:
        hint = "name one with its config.json, model.safetensors and tokenizer: --text-encoder NAME|DIR"
        raise UserError(f"{source}: {problem.what}", hint=hint, code=CHECKPOINT) from None
    assert isinstance(text, HuggingFaceTextEncoder)
    if donor.text_tensors:
        fill_text(text.model, donor.text_tensors, donor.encoder)
    if text.context_dim != network.context_dim:
        said = f"{source}: its network reads text of {network.context_dim} features, {donor.encoder} gives "
        hint = "give the one it was trained with: --text-encoder NAME|DIR"
        raise UserError(f"{said}{text.context_dim}", hint=hint, code=CHECKPOINT)
    whole = donor.text_tensors is not None  # of no name, so that there is no other place to have them from
    text_encoders.keep(text, donor.encoder, folder, whole=whole)
    return text, text_encoders.tokenizer_hash(text)


def _labels(config: decoding.DenoiserConfig, donor: Donor, folder: Path) -> tuple[TextEncoder, dict[str, str]]:
    """The classes of a DiT as captions."""
    vocabulary = json.dumps({"classes": donor.classes}, ensure_ascii=False, indent=0)
    text: TextEncoder = config.text.build(vocabulary)
    assert donor.network.labels is not None
    tensors: Mapping[str, torch.Tensor] = {"embedding.weight": donor.network.labels}
    fill(text, tensors, folder / "text_encoder")
    text_encoders.keep_vocabulary(vocabulary, folder)
    (folder / "text_encoder").mkdir()
    save_tensors(folder / "text_encoder" / "model.safetensors", text.state_dict())
    return text.eval().requires_grad_(False), {"vocabulary": text_encoders.vocabulary_hash(vocabulary)}
