"""A whole generating system, put together: from a latent data set to be trained on, or from a finished run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.base import Autoencoder
from ldm.backbones import Backbone
from ldm.backbones.base import share_rates
from ldm.conditioning import Cond
from ldm.diffusion import Diffusion
from ldm.pipeline import Pipeline, Sampling
from ldm.text import HuggingFace, TextEncoder
from training.commands import door
from training.data.latents import Latents
from training.errors import CHECKPOINT, DATA, UserError, as_user_error
from training.guarding import make_folder, refuse_links
from training.models import text_encoders
from training.models.adapters import at_work, chosen_of, is_adapter, place_of_base
from training.models.autoencoders import autoencoder_hashes, load_autoencoder
from training.models.folders import copy_model, fill, find, weights
from training.models.lineage import BEGUN_WITH, same_ingredients, store_ingredients
from training.models.vocabulary import grown, vocabulary
from training.settings import decoding
from training.shards.remote import NULL
from training.tensors import content_hash, load_tensors, save_tensors

Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class HashedPipeline(Pipeline):
    """A pipeline with the content hashes of what it is made of, each taken once, when it was loaded."""

    hashes: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """What stage two trains and draws with."""

    backbone: Backbone
    text: TextEncoder
    autoencoder: Autoencoder
    pipeline: Pipeline
    null: Cond | None  # stored encoding of the empty caption, where embeddings are stored
    shape: tuple[int, ...]  # one latent: (C, h, w)
    hashes: dict[str, str]
    text_source: str  # what a frozen text encoder was loaded from, or the vocabulary of one that learns


def assemble(
    config: decoding.DenoiserConfig,
    latents: Path,
    dataset: Latents,
    home: Path | None,
    text_encoder: str | None,
    device: torch.device,
    *,
    draws: bool = True,
    grows: bool = False,
) -> Parts:
    """Everything a denoiser is trained with; the vocabulary is the one stored in `home` (final/), where there is one,
    and where it `grows` what it lacks of the captions' words or labels after it.

    A process that `draws` no pictures does without a frozen text encoder where its embeddings are stored.
    Raises UserError where the latents were made by another autoencoder than the one stored beside them.
    """
    refuse_links(latents)
    autoencoder = load_autoencoder(latents / "autoencoder", device)
    hashes = autoencoder_hashes(autoencoder)
    made_by = dataset.shards.summary["encoder"]
    if made_by != hashes["encoder"]:
        raise UserError(
            f"latents were made by autoencoder {made_by[:12]}, the one beside them is {hashes['encoder'][:12]}",
            hint=f"encode again: {door('encode_latents --autoencoder RUN --data PICTURES --output DIR')}",
            code=CHECKPOINT,
        )
    null = None
    if isinstance(config.text, HuggingFace):
        text, null, text_source = _frozen_text(config.text, latents, dataset, text_encoder, home, draws=draws)
        if not isinstance(text, text_encoders.StoredText):  # whoever draws, tells
            hashes |= {"text_encoder": text_encoders.identity(text)["hash"], **text_encoders.tokenizer_hash(text)}
    else:
        if home and text_encoders.holds_vocabulary(home):
            text_source = text_encoders.stored_vocabulary(home)
            if grows:
                with as_user_error("raise what the key named allows", DATA):
                    text_source = grown(config.text, dataset, text_source)
        else:
            text_source = vocabulary(config.text, dataset)
        text, hashes["vocabulary"] = config.text.build(text_source), text_encoders.vocabulary_hash(text_source)
    shape = (dataset.shape[0] // (2 if autoencoder.norm.gaussian else 1), *dataset.shape[1:])
    backbone, text = backbone_to_train(config, autoencoder, text).to(device), text.to(device)
    pipeline = draw_with(config, autoencoder, backbone, text, hashes)
    return Parts(backbone, text, autoencoder, pipeline, null, shape, hashes, text_source)


def backbone_for(config: decoding.DenoiserConfig, autoencoder: Autoencoder, text: TextEncoder) -> Backbone:
    """A freshly initialised backbone for such latents and text. Raises ValueError on a misfit."""
    unit = autoencoder.factor if config.conditioning.size else 0
    channels, sizes = autoencoder.latent_channels, {"context_dim": text.context_dim, "pooled_dim": text.pooled_dim}
    numbers = *config.objective.reads, *config.student.reads
    backbone: Backbone = config.backbone.build(
        channels=channels, **sizes, **config.image.inputs(channels, autoencoder.image_channels), numbers=numbers,
        size_unit=unit,
    )
    return backbone


def backbone_to_train(config: decoding.DenoiserConfig, autoencoder: Autoencoder, text: TextEncoder) -> Backbone:
    """The same, whose layers are told their rates where one was found at another width."""
    backbone = backbone_for(config, autoencoder, text)
    if (narrow := config.backbone.narrow) is not None:
        with torch.device("meta"):
            share_rates(backbone, backbone_for(dataclasses.replace(config, backbone=narrow), autoencoder, text))
    return backbone


def store(parts: Parts, latents: Path, home: Path) -> None:
    """Put what does not change in training into `home` (final/): autoencoder, and vocabulary or frozen text encoder."""
    copy_model(latents / "autoencoder", home / "autoencoder")
    if parts.text.trainable:
        text_encoders.keep_vocabulary(parts.text_source, home)
    else:
        text_encoders.keep(parts.text, parts.text_source, home)


def _frozen_text(
    config: HuggingFace, latents: Path, dataset: Latents, name: str | None, home: Path | None, *, draws: bool
) -> tuple[TextEncoder, Cond | None, str]:
    null = None
    text: TextEncoder
    if dataset.text:
        stored = load_tensors(latents / NULL)
        null = Cond(
            stored["context"][None].float(),
            torch.ones(1, len(stored["context"]), dtype=torch.bool),
            stored["pooled"][None].float() if "pooled" in stored else None,
        )
        text = text_encoders.load_stored(config, latents, name) if draws else text_encoders.StoredText(null)
        name = text_encoders.stored_identity(latents)["name"]
    elif name:
        text = text_encoders.load_as_stored(config, name, text_encoders.stored_record(home))
    else:
        raise UserError(
            "the config names a Hugging Face text encoder, but none was given and the latents hold no text embeddings",
            hint="give --text-encoder NAME|DIR here or to encode_latents, or take a config whose text encoder "
            "learns, as --config dit-s",
            code=DATA,
        )
    return text, null, str(name)


def draw_with(
    config: decoding.DenoiserConfig,
    autoencoder: Autoencoder,
    backbone: nn.Module,
    text: TextEncoder,
    hashes: dict[str, str],
) -> HashedPipeline:
    """The pipeline of a config and its networks."""
    diffusion = Diffusion(
        schedule=config.schedule, prediction=config.prediction, learned_variance=config.backbone.learned_variance
    )
    denoiser, sampling = config.objective.denoiser(backbone, diffusion), sampling_of(config)
    parts = autoencoder, denoiser, text, sampling, config.sample.size
    more: dict[str, Any] = {"image": config.image, "student": config.student, "sizes": config.sample.buckets}
    return HashedPipeline(*parts, **more, sized=config.conditioning.size, hashes=hashes)


def sampling_of(config: decoding.DenoiserConfig) -> Sampling:
    """How a config says that pictures are made."""
    return Sampling(sampler=config.sampler, grid=config.grid, guidance=config.guidance, steps=config.sample.steps,
                    dynamic_threshold=config.sample.dynamic_threshold, image_scale=config.sample.image_scale,
                    original_size=config.sample.original_size, crop_offset=config.sample.crop_offset)


def export_learned(parts: Parts, home: Path) -> None:
    """Store a text encoder that was trained (frozen ones were stored at the start), and what names all of final/."""
    if parts.text.trainable:
        make_folder(home / "text_encoder")
        save_tensors(home / "text_encoder" / "model.safetensors", parts.text.state_dict())
    begun = {name: parts.hashes[name] for name in BEGUN_WITH if name in parts.hashes}
    store_ingredients(home, begun | networks(parts.pipeline))


def networks(pipeline: Pipeline) -> dict[str, str]:
    """The hashes of what training changes, and of a frozen text encoder."""
    backbone, text = pipeline.denoiser.backbone, pipeline.text
    return {"denoiser": content_hash(backbone.state_dict()), "text_encoder": content_hash(text.state_dict())}  # type: ignore[attr-defined]


def load_pipeline(
    path: str | Path,
    device: torch.device | str = "auto",
    text_encoder: str | None = None,
    preview: str | Path | None = None,
    adapters: Sequence[str | Path | tuple[str | Path, float]] = (),
) -> HashedPipeline:
    """A denoiser's run (finished or not) or checkpoint, ready to draw: `load_pipeline(RUN)(["a caption"])`.

    `preview`: the run of a tiny autoencoder distilled from the denoiser's own, to stand in for it: quicker, rougher.
    `adapters`: runs learned upon this one, `["runs/lora", ("runs/style", 0.5)]`. The run of an adapter is loaded with
    its base.
    Raises UserError (code 4) where a part of it is another than it was trained with.
    """
    from training.machine.processes import resolve
    from training.models.previews import load_preview

    target = resolve(device) if isinstance(device, str) else device
    folder = find(path, "denoiser")
    config, file, final = folder.config(), folder.weights, folder.final
    assert isinstance(config, decoding.DenoiserConfig)
    if is_adapter(config):
        chosen = [(path, 1.0), *adapters]
        whole = load_pipeline(place_of_base(path, folder), target, text_encoder, preview, chosen)
        return dataclasses.replace(whole, sampling=sampling_of(config), size=config.sample.size)
    autoencoder = load_autoencoder(final / "autoencoder", target)
    hashes = {"autoencoder": content_hash(autoencoder.state_dict())}
    same_ingredients(final, hashes)
    text, words = _stored_text(config.text, final, text_encoder)
    backbone = backbone_for(config, autoencoder, text)
    fill_learned(backbone, text, file, final)
    for part in (backbone, text):
        part.to(target).eval().requires_grad_(False)
    pipeline = draw_with(config, autoencoder, backbone, text, hashes | words)
    pipeline = dataclasses.replace(pipeline, hashes=pipeline.hashes | networks(pipeline))
    if folder.finished:  # a checkpoint's weights are other ones, and under the hashes of its own manifest
        same_ingredients(final, pipeline.hashes)
    if adapters:
        denoiser, text, theirs = at_work(pipeline, pipeline.hashes, [chosen_of(adapter) for adapter in adapters])
        pipeline = dataclasses.replace(pipeline, denoiser=denoiser, text=text, hashes=pipeline.hashes | theirs)
    if preview:
        tiny = load_preview(preview, hashes["autoencoder"], target)
        hashes_with_preview = pipeline.hashes | {"autoencoder": content_hash(tiny.state_dict())}
        pipeline = dataclasses.replace(pipeline, autoencoder=tiny, hashes=hashes_with_preview)
    return pipeline


def _stored_text(config: Any, final: Path, override: str | None) -> tuple[TextEncoder, dict[str, str]]:
    """The text encoder of final/, one that learned still without its weights, and the hash of its words."""
    if isinstance(config, HuggingFace):
        text = text_encoders.load_stored(config, final, override)
        return text, text_encoders.tokenizer_hash(text)
    vocabulary = text_encoders.stored_vocabulary(final)
    words = {"vocabulary": text_encoders.vocabulary_hash(vocabulary)}
    same_ingredients(final, words)  # before its size is taken for an error of the weights
    with as_user_error(f"put back {final / 'tokenizer'} as it was trained with", CHECKPOINT):
        return config.build(vocabulary), words


def fill_learned(
    backbone: nn.Module, text: TextEncoder, file: Path, final: Path, made: Callable[[Weights], Weights] = dict
) -> None:
    """Load what was trained, from an exported `file` or from a checkpoint folder; the backbone's as `made` of them."""
    if file.is_file():
        fill(backbone, made(weights(file, "backbone")), file)
        if text.trainable:
            fill(text, load_tensors(final / "text_encoder" / "model.safetensors"), final / "text_encoder")
        return
    network = weights(file, "denoiser")
    of_backbone = {k.removeprefix("backbone."): v for k, v in network.items() if k.startswith("backbone.")}
    fill(backbone, made(of_backbone), file)
    if text.trainable:
        fill(text, {k.removeprefix("text."): v for k, v in network.items() if k.startswith("text.")}, file)
