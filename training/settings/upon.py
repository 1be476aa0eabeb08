"""The config of an adapter: its own few sections over the config of the base that it is learned upon."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.messages import note
from training.settings import decoding, reading

FOLDER = "adapter"  # of configs/
TRAINING = ("optimizer", "train")  # what the base was trained with says nothing of its adapters
FIXED = ("backbone", "text", "image", "schedule", "prediction", "objective", "format")  # what the base is


def load_upon(base: decoding.DenoiserConfig, source: str, overrides: Mapping[str, str]) -> decoding.DenoiserConfig:
    """Config NAME or FILE over that of the base, with `section.key -> text` overrides over both.

    Raises UserError where there is no adapter in it, or where it would change what the base is.
    """
    text, where = reading.read(FOLDER, source)
    own, values = reading.parse(text, where), decoding.to_values(base)
    if base.weighting.kind == "learned":
        note("the base's learned weighting is not part of its model: the adapter is trained with weighting uniform")
        values["weighting"] = {"kind": "uniform"}
    merged = {**values, **{name: {} for name in TRAINING}}
    for name, section in own.items():
        before = merged.get(name, {})
        other = isinstance(section, dict) and section.get("kind", before.get("kind")) != before.get("kind")
        merged[name] = section if other or not isinstance(section, dict) else {**before, **section}
    lines = {key: f"{where}:{line}" for key, line in reading.lines(text)}
    laid = decoding.lay_over("denoiser", merged, overrides, where)
    config = decoding.decode("denoiser", laid, lines | dict.fromkeys(overrides, decoding.ASKED))
    assert isinstance(config, decoding.DenoiserConfig)
    if config.adapter.kind == "none":
        known = ", ".join(reading.names(FOLDER))
        hint = f"--base takes the configs {known}, or a file with an [adapter]"
        raise UserError(f"{where} has no [adapter]", hint=hint)
    if config.weighting.kind == "learned":
        what = "weighting.kind learned is learned beside a whole model, and the training of an adapter learns none"
        raise UserError(what, hint="give --weighting.kind uniform")
    changed = [line for line in decoding.diff(decoding.to_values(base), decoding.to_values(config))
               if line.partition(".")[0] in FIXED]  # fmt: skip
    if changed:
        what = "an adapter leaves its base as it is, but the config would change\n       " + "\n       ".join(changed)
        raise UserError(what, hint="leave these keys out; --init-from trains a whole model of another config")
    return config


def learned_upon(config: Any) -> bool:
    """Whether a config is that of an adapter upon another run, whose weights no other run can begin with."""
    return getattr(getattr(config, "adapter", None), "kind", "none") != "none"


def refuse_without_base(config: Any) -> None:
    """Raises UserError for a config with an adapter and no base for it."""
    if learned_upon(config):
        what = f"adapter.kind {config.adapter.kind} is learned upon a trained model"
        raise UserError(what, hint="name it with --base RUN")


def refuse_name_without_base(source: str) -> None:
    """Raises UserError for the name of an adapter's config where there is no base for it."""
    if source in reading.names(FOLDER) and not Path(source).exists():
        raise UserError(f"--config {source} is learned upon a trained model", hint="name it with --base RUN")


def missing_config() -> UserError:
    """What to say where --base comes without a config of an adapter."""
    what = "--base needs the config of an adapter: nothing is proposed for one"
    return UserError(what, hint=f"give one with --config: {', '.join(reading.names(FOLDER))}, or a file")
