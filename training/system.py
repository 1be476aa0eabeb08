"""A whole generating system, put together: from a latent data set to be trained on, or from a finished run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoencoder.base import Autoencoder
from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.pipeline import Pipeline, Sampling
from ldm.text import HuggingFace, TextEncoder
from training import config as configs
from training import text as texts
from training.classifier import Judge
from training.data import Latents
from training.errors import CHECKPOINT, DATA, UserError
from training.files import content_hash, load_tensors, read_json, save_tensors
from training.runs import autoencoder_hashes, copy_model, fill, find, load_autoencoder, weights


@dataclass(frozen=True)
class Parts:
    """What stage two trains and draws with."""

    backbone: nn.Module
    text: TextEncoder
    autoencoder: Autoencoder
    pipeline: Pipeline
    null: Cond | None  # stored encoding of the empty caption, where embeddings are stored
    shape: tuple[int, ...]  # one latent: (C, h, w)
    hashes: dict[str, str]
    named: str  # what a frozen text encoder was loaded from, or the vocabulary of one that learns


def assemble(
    config: configs.DenoiserConfig,
    latents: Path,
    dataset: Latents,
    home: Path | None,
    text_encoder: str | None,
    device: torch.device,
) -> Parts:
    """Everything a denoiser is trained with; the vocabulary is the one stored in `home` (final/), where there is one.

    Raises UserError where the latents were made by another autoencoder than the one stored beside them.
    """
    autoencoder = load_autoencoder(latents / "autoencoder", device)
    hashes = autoencoder_hashes(autoencoder)
    made_by = dataset.shards.summary["encoder"]
    if made_by != hashes["encoder"]:
        raise UserError(
            f"latents were made by autoencoder {made_by[:12]}, the one beside them is {hashes['encoder'][:12]}",
            hint="encode again with scripts/encode_latents.py",
            code=CHECKPOINT,
        )
    null = None
    if isinstance(config.text, HuggingFace):
        text, null, named = _frozen_text(config.text, latents, dataset, text_encoder)
        hashes["text_encoder"] = texts.identity(text)["hash"]
    else:
        if home and (home / "tokenizer" / texts.VOCABULARY).is_file():
            named = texts.stored_vocabulary(home)
        else:
            named = config.text.vocabulary(c for i in range(len(dataset)) for c in dataset.captions(i))
        text = config.text.build(named)
    shape = (dataset.shape[0] // (2 if autoencoder.norm.gaussian else 1), *dataset.shape[1:])
    backbone = config.backbone.build(channels=shape[0], context_dim=text.context_dim, pooled_dim=text.pooled_dim)
    backbone, text = backbone.to(device), text.to(device)
    pipeline = draw_with(config, autoencoder, backbone, text)
    return Parts(backbone, text, autoencoder, pipeline, null, shape, hashes, named)


def store(parts: Parts, latents: Path, home: Path) -> None:
    """Put what does not change in training into `home` (final/): autoencoder, and vocabulary or frozen text encoder."""
    copy_model(latents / "autoencoder", home / "autoencoder")
    if parts.text.trainable:
        texts.keep_vocabulary(parts.named, home)
    else:
        texts.keep(parts.text, parts.named, home)


def _frozen_text(
    config: HuggingFace, latents: Path, dataset: Latents, name: str | None
) -> tuple[TextEncoder, Cond | None, str]:
    null = None
    if dataset.text:
        text = texts.load_kept(config, latents, name)
        stored = load_tensors(latents / "text_encoder" / "null.safetensors")
        null = Cond(
            stored["context"][None].float(),
            torch.ones(1, len(stored["context"]), dtype=torch.bool),
            stored["pooled"][None].float() if "pooled" in stored else None,
        )
        name = read_json(latents / "text_encoder" / "identity.json")["name"]
    elif name:
        text = texts.load_huggingface(config, name)
    else:
        raise UserError(
            "the config names a Hugging Face text encoder, but none was given and the latents hold no text embeddings",
            hint="give --text-encoder NAME|DIR here or to scripts/encode_latents.py, or use --text.kind scratch",
            code=DATA,
        )
    return text, null, str(name)


def draw_with(
    config: configs.DenoiserConfig, autoencoder: Autoencoder, backbone: nn.Module, text: TextEncoder
) -> Pipeline:
    """The pipeline of a config and its networks."""
    diffusion = Diffusion(
        schedule=config.schedule, prediction=config.prediction, learned_variance=config.backbone.learned_variance
    )
    sampling = Sampling(sampler=config.sampler, grid=config.grid, guidance=config.guidance, steps=config.sample.steps)
    return Pipeline(autoencoder, Denoiser(backbone, diffusion), text, sampling, config.sample.size)


def export_text(text: TextEncoder | None, home: Path) -> None:
    """Store a text encoder that was trained with the denoiser (frozen ones were stored at the start)."""
    if text is not None:
        (home / "text_encoder").mkdir(parents=True, exist_ok=True)
        save_tensors(home / "text_encoder" / "model.safetensors", text.state_dict())


def load_pipeline(
    path: str | Path,
    device: torch.device | str = "auto",
    text_encoder: str | None = None,
    preview: str | Path | None = None,
) -> Pipeline:
    """A denoiser's run (finished or not) or checkpoint, ready to draw: `load_pipeline(RUN)(["a caption"])`.

    `preview`: the run of a tiny autoencoder distilled from the denoiser's own, to stand in for it: quicker, rougher.
    """
    from training.distillation import load_preview
    from training.launch import resolve

    target = resolve(device) if isinstance(device, str) else device
    home, file = find(path, "denoiser")
    config = configs.decode("denoiser", read_json(home / "config.json"))
    assert isinstance(config, configs.DenoiserConfig)
    final = home if (home / "autoencoder").is_dir() else home / "final"
    autoencoder = load_autoencoder(final / "autoencoder", target)
    same_autoencoder(final, autoencoder)
    if isinstance(config.text, HuggingFace):
        text = texts.load_kept(config.text, final, text_encoder)
    else:
        text = config.text.build(texts.stored_vocabulary(final))
    backbone = config.backbone.build(
        channels=autoencoder.latent_channels, context_dim=text.context_dim, pooled_dim=text.pooled_dim
    )
    if file.is_file():
        fill(backbone, weights(file, "backbone"), file)
        if text.trainable:
            fill(text, load_tensors(final / "text_encoder" / "model.safetensors"), final / "text_encoder")
    else:
        network = weights(file, "denoiser")
        fill(backbone, {k.removeprefix("backbone."): v for k, v in network.items() if k.startswith("backbone.")}, file)
        if text.trainable:
            fill(text, {k.removeprefix("text."): v for k, v in network.items() if k.startswith("text.")}, file)
    for part in (backbone, text):
        part.to(target).eval().requires_grad_(False)
    return draw_with(config, load_preview(preview, autoencoder) if preview else autoencoder, backbone, text)


def same_autoencoder(final: Path, autoencoder: Autoencoder) -> None:
    """Raises UserError (code 4) where the autoencoder in a run's final/ is not the one that run.json names."""
    record = final.parent / "run.json"
    known = read_json(record).get("hashes", {}).get("autoencoder") if record.is_file() else None
    found = autoencoder_hashes(autoencoder)["autoencoder"]
    if known not in (None, found):
        what = f"{final / 'autoencoder'} is {found[:12]}, the denoiser was trained with {known[:12]}"
        raise UserError(what, hint="put back the one it was trained with, or encode and train again", code=CHECKPOINT)


def add_weak(pipeline: Pipeline, path: str | Path) -> None:
    """Put the poorer model of another run or checkpoint beside the denoiser, for autoguidance.

    Raises UserError where it was made for other captions or another process.
    """
    other = load_pipeline(path, pipeline.device)
    widths = [(text.context_dim, text.pooled_dim) for text in (other.text, pipeline.text)]
    if widths[0] != widths[1] or other.denoiser.schedule != pipeline.denoiser.schedule:
        raise UserError(
            f"{path} has another schedule or text encoder than the model it is to guide",
            hint="give an earlier checkpoint of the same run, or a smaller model trained with the same settings",
            code=CHECKPOINT,
        )
    pipeline.denoiser = dataclasses.replace(pipeline.denoiser, weak=other.denoiser)


def fill_network(network: Any, path: str) -> None:
    """`--init-from`: the weights of another run of the same shape, nothing else."""
    other = load_pipeline(path, "cpu")
    fill(network.backbone, other.denoiser.backbone.state_dict(), Path(path))  # type: ignore[attr-defined]
    if network.text is not None:
        fill(network.text, other.text.state_dict(), Path(path))


def pipeline_hashes(pipeline: Pipeline) -> dict[str, str]:
    """The content hashes a picture carries: whole autoencoder, backbone, text encoder."""
    hashes = {
        "autoencoder": content_hash(pipeline.autoencoder.state_dict()),
        "denoiser": content_hash(pipeline.denoiser.backbone.state_dict()),  # type: ignore[attr-defined]
        "text_encoder": content_hash(pipeline.text.state_dict()),
    }
    if pipeline.denoiser.weak is not None:
        hashes["weak"] = content_hash(pipeline.denoiser.weak.backbone.state_dict())  # type: ignore[attr-defined]
    if isinstance(pipeline.judge, Judge):
        hashes["classifier"] = content_hash(pipeline.judge.model.state_dict())
    return hashes
