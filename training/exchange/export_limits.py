"""What keeps a denoiser from being opened by diffusers: every reason at once, each with the config key that is free of
it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from ldm.schedules import Flow, Table
from ldm.text import HuggingFace
from training.errors import CHECKPOINT, UserError
from training.exchange import scheduler_import
from training.exchange.autoencoder_layouts import LAYOUTS
from training.exchange.transformer_layouts import DIT_OURS, PIXART_OURS
from training.settings.decoding import DenoiserConfig

# What diffusers calls our predictions, on a table and on `flow`.
PREDICTIONS = tuple({ours: theirs for theirs, ours in known.items()} for known in scheduler_import.PREDICTIONS)
NULL_CLASS = 1000  # DiTPipeline's, whatever the model: so many classes come before it
PIPELINES = {
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "PixArtTransformer2DModel": "PixArtAlphaPipeline",
    "DiTTransformer2DModel": "DiTPipeline",
}
WHY = {
    "conditioning": "its blocks are modulated otherwise",
    "cross_norm": "its cross-attention reads tokens that are not normalised",
    "pooled": "it is told no pooled text",
    "pooled_projection": "it adds the embedding of a class as it is",
    "frequency_shift": "its sinusoids of the noise level are others",
    "mlp": "its caption projection is GELU by tanh, always",
    "mlp_ratio": "its feed-forward layers are 4 times as wide as its tokens",
    "qk_norm": "its queries and keys are not normalised",
    "norm": "it has layer norms",
    "position": "it has the fixed position table",
}


class Obstacle(NamedTuple):
    """A `key` of the config, its `value`, `why` diffusers cannot hold that, and what it can (`instead`)."""

    key: str
    value: Any
    why: str
    instead: str

    def __str__(self) -> str:
        return f"{self.key} = {json.dumps(self.value)}: {self.why}; {self.instead}"


class Facts(NamedTuple):
    """What a config does not say: the `[model]` of its autoencoder, how many labels there are, whether the tokenizer
    lower-cases and whether the text encoder is CLIP's."""

    model: Any
    labels: int = 0
    lowers: bool = False
    clip: bool = True


def diffusers_class(config: DenoiserConfig) -> str:
    """The class of diffusers' that comes nearest to the backbone; empty where none does."""
    backbone = config.backbone
    if backbone.kind == "unet":
        return "UNet2DConditionModel"
    classes = {"cross": "PixArtTransformer2DModel", "none": "DiTTransformer2DModel"}
    return classes.get(backbone.text, "") if backbone.kind == "dit" else ""


def refuse(found: list[Obstacle], where: str) -> None:
    """Raises UserError with all that was found."""
    if found:
        text = "\n  ".join(map(str, found))
        hint = "--config portable-unet and portable-dit train what fits; --pt2 and --onnx write any model's networks"
        raise UserError(f"{where} cannot hold this model:\n  {text}", hint=hint, code=CHECKPOINT)


def obstacles(config: DenoiserConfig, facts: Facts) -> list[Obstacle]:
    """Every reason, in the order of a config's sections; none where diffusers' pipeline draws the same."""
    name = diffusers_class(config)
    found = [*_backbone(config, name), *_text(config, name, facts), *_additions(config), *_process(config)]
    found += _size(config, name, facts.model.factor)
    if facts.model.kind != "kl":
        why = "its pipelines have one scaling_factor; our normaliser, per channel, folds into kl's layers alone"
        found.append(Obstacle("model.kind (autoencoder)", facts.model.kind, why, f'"kl" can be written{_alone(facts)}'))
    return found


def _alone(facts: Facts) -> str:
    """How an autoencoder that no pipeline takes is written by itself, where diffusers has a class for it."""
    names = [name for name, (kind, *_) in LAYOUTS.items() if kind == facts.model.kind]
    return "".join(f", and RUN/final/autoencoder alone as {name} by convert_autoencoder export" for name in names)


def _size(config: DenoiserConfig, name: str, factor: int) -> Iterator[Obstacle]:
    size = config.sample.size
    if name == "DiTTransformer2DModel" and any(side and side != factor * config.backbone.base_size for side in size):
        why, side = "DiTPipeline draws squares of the size of its position table", factor * config.backbone.base_size
        yield Obstacle("sample.size", size, why, f"[{side}, {side}] can be written")
    elif any(side % 8 for side in size):
        yield Obstacle("sample.size", size, "its pipelines draw sides that 8 divides", "a multiple of 8 can be written")


def _backbone(config: DenoiserConfig, name: str) -> Iterator[Obstacle]:
    backbone = config.backbone
    if not name:
        key = "text" if backbone.kind == "dit" else "kind"
        instead = '"cross" can be written' if key == "text" else '"unet" and "dit" can be written'
        yield Obstacle(f"backbone.{key}", getattr(backbone, key), "diffusers has no such network", instead)
    elif name == "UNet2DConditionModel":
        for key in ("position", "query_position"):
            if getattr(backbone, key):
                why = "UNet2DConditionModel has no position table"
                yield Obstacle(f"backbone.{key}", True, why, "false can be written")
        if backbone.pooled:
            why = "StableDiffusionPipeline tells its U-Net no pooled text"
            yield Obstacle("backbone.pooled", True, why, "false can be written")
    else:
        wanted = (PIXART_OURS if name == "PixArtTransformer2DModel" else DIT_OURS) | {"mlp": "gelu-tanh"}
        for key, value in wanted.items():
            if (ours := getattr(backbone, key, None)) != value:
                yield Obstacle(f"backbone.{key}", ours, f"{name}: {WHY[key]}", f"{json.dumps(value)} can be written")


def _text(config: DenoiserConfig, name: str, facts: Facts) -> Iterator[Obstacle]:
    text = config.text
    if name == "DiTTransformer2DModel":
        if text.kind != "label":
            yield Obstacle("text.kind", text.kind, "DiTPipeline is told class numbers", '"label" can be written')
        elif facts.labels > NULL_CLASS:
            why = f"DiTPipeline takes class {NULL_CLASS} for none"
            yield Obstacle("text.kind", f"label of {facts.labels}", why, f"up to {NULL_CLASS} labels can be written")
        return
    if not isinstance(text, HuggingFace):
        why = "transformers has no such text encoder"
        yield Obstacle("text.kind", text.kind, why, '"huggingface" can be written')
        return
    if text.layer != -1:
        yield Obstacle("text.layer", text.layer, "its pipelines read the last layer", "-1 can be written")
    masked, lower = name == "PixArtTransformer2DModel", name == "PixArtTransformer2DModel"
    if name and text.masked != masked:
        why = f"{PIPELINES[name]} {'masks padding' if masked else 'tells its network of no padding'}"
        yield Obstacle("text.masked", text.masked, why, f"{json.dumps(masked)} can be written")
    if name and text.lower != lower and not facts.lowers:
        why = f"{PIPELINES[name]} {'lower-cases' if lower else 'does not lower-case'} prompts"
        yield Obstacle("text.lower", text.lower, why, f"{json.dumps(lower)} can be written")


def _additions(config: DenoiserConfig) -> Iterator[Obstacle]:
    for section in ("adapter", "image"):
        if (kind := getattr(config, section).kind) != "none":
            why = "its pipelines of text alone have no place for it"
            yield Obstacle(f"{section}.kind", kind, why, '"none" can be written')
    if config.conditioning.size:
        why = "its pipelines of these networks tell none how a picture was cut"
        yield Obstacle("conditioning.size", True, why, "false can be written")
    objective = config.objective
    if objective.reading is not None and (objective.reads or objective.aim != "none"):
        why = "its schedulers take the steps of a denoiser, and this model answers where x goes"
        yield Obstacle("objective.kind", objective.kind, why, "the model that taught it can be written")
    if config.student.embedded:
        why = "its pipelines tell a network no guidance scale"
        yield Obstacle("student.guidance_scale", config.student.scales, why, "one scale, baked in, can be written")


def _process(config: DenoiserConfig) -> Iterator[Obstacle]:
    schedule, prediction = config.schedule, config.prediction.kind
    if not isinstance(schedule, Table | Flow):
        why = "its pipelines' schedulers walk DDPM tables and flow alone"
        yield Obstacle("schedule.kind", schedule.kind, why, '"flow" and every "ddpm-..." can be written')
    elif prediction not in (known := PREDICTIONS[isinstance(schedule, Flow)]):
        text = f"{' and '.join(json.dumps(kind) for kind in known)} can be written"
        yield Obstacle("prediction.kind", prediction, f"no scheduler of the schedule {schedule.kind} reads it", text)
