"""Adapters on disk: what a run has learned upon a base, with the hashes of that base, and both put together again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.adapters import Adapter, joined
from ldm.adapters.low_rank import merge
from ldm.adapters.words import Words
from ldm.denoiser import Denoiser
from training.errors import CHECKPOINT, UserError, as_user_error
from training.files import write_json
from training.guarding import read_record
from training.machine.launcher import first_process
from training.messages import note
from training.models.cards import BASE
from training.models.folders import Found, fill, find, name_of, weights
from training.runs.ingredients import difference
from training.settings import decoding
from training.tensors import content_hash

if TYPE_CHECKING:
    from ldm.backbones.base import Backbone
    from ldm.pipeline import Pipeline
    from ldm.text import TextEncoder

WHOLE_TEACHER = "make one model of both, export_model BASE --adapter RUN --output DIR, and give that with --teacher"
OF_BASE = ("autoencoder", "denoiser", "text_encoder", "vocabulary")  # the hashes that make a base the same one


class Chosen(NamedTuple):
    """An adapter's run to be put to work, with its weight."""

    run: str | Path
    weight: float = 1.0


def parse_chosen(flag: str, text: str) -> Chosen:
    """`RUN` or `RUN:WEIGHT`, as a flag takes it. Raises UserError where the weight is no finite number."""
    from math import isfinite

    run, colon, weight = text.rpartition(":")
    if not colon or "/" in weight or not run or Path(text).exists():  # a folder may have a colon in its name
        return Chosen(text)
    try:
        number = float(weight)
    except ValueError:
        return Chosen(text)
    if not isfinite(number):
        raise UserError(f"{flag} {text}: the weight must be a finite number", hint=f"write {flag} RUN:0.8")
    return Chosen(run, number)


def chosen_of(adapter: str | Path | tuple[str | Path, float]) -> Chosen:
    """`(RUN, WEIGHT)`, `"RUN:WEIGHT"` or a run alone, as a call of Python gives it."""
    if isinstance(adapter, tuple):
        return Chosen(*adapter)
    return Chosen(adapter) if isinstance(adapter, Path) else parse_chosen("adapters", adapter)


def is_adapter(config: Any) -> bool:
    """Whether a denoiser's config is that of an adapter upon another run."""
    return bool(config.adapter.kind != "none")


def refuse_adapter(path: str | Path, found: Found, instead: str) -> None:
    """Raises UserError where a whole model is needed and the run of an adapter is given."""
    if is_adapter(found.config()):
        base = stored_base(found.final)["name"]
        raise UserError(f"{path} is an adapter upon {base}, not a whole model", hint=instead, code=CHECKPOINT)


def config_of_teacher(teacher: str) -> decoding.DenoiserConfig:
    """The config of a trained denoiser that a student is to learn from."""
    return config_of_base(teacher, WHOLE_TEACHER)


def config_of_base(base: str, instead: str = "give the model that it was learned upon with --base",
                   ) -> decoding.DenoiserConfig:
    """The config of a trained denoiser that an adapter is to be learned upon, or a student of. `instead`: what to give
    in place of an adapter's run."""
    found = find(base, "denoiser")
    refuse_adapter(base, found, instead)
    config = found.config()
    assert isinstance(config, decoding.DenoiserConfig)
    return config


def keep_base(final: Path, base: str, hashes: Mapping[str, str]) -> None:
    """Write down upon what a run learns: its name and hashes in `final`, its place beside."""
    write_json(final / BASE, {"name": name_of(base), "hashes": dict(hashes)})
    place = base if not Path(base).exists() else os.path.abspath(base)
    write_json(final.parent / BASE, {"found_at": place})


def stored_base(final: Path) -> dict[str, Any]:
    """What `keep_base` wrote. Raises UserError where it did not."""
    return read_record(final / BASE, {"name": str, "hashes": dict}, hint="is this the run of an adapter?")


def place_of_base(path: str | Path, found: Found) -> str:
    """Where the base of an adapter's run was when it was trained. Raises UserError where it is no longer."""
    from training.settings.embedded import located

    noted = found.final.parent / BASE
    place = read_record(noted, {"found_at": str})["found_at"] if noted.is_file() else ""
    if not place or not located(place).is_dir():
        name = stored_base(found.final)["name"]
        gone = f"which is not at {place} any more" if place else "and does not say where that is"
        what = f"{path} is an adapter upon {name}, {gone}"
        raise UserError(what, hint="give --model BASE --adapter RUN", code=CHECKPOINT)
    return place


def same_base(path: str | Path, final: Path, hashes: Mapping[str, str]) -> None:
    """Raises UserError (code 4) with both hashes where the model is not the one that the adapter was learned upon."""
    stored = stored_base(final)
    if change := difference(stored["hashes"], hashes, [name for name in OF_BASE if name in stored["hashes"]]):
        what = f"{path} was learned upon {stored['name']}, whose {change.name} is {change.before}, not {change.now}"
        raise UserError(what, hint="give the model that it was learned upon with --model", code=CHECKPOINT)


def at_work(pipeline: Pipeline, hashes: Mapping[str, str],
            chosen: Sequence[Chosen]) -> tuple[Denoiser, TextEncoder, dict[str, str]]:
    """Denoiser and text encoder of a pipeline with the adapters at work in them; the adapters' hashes, by `adapter-N`.

    Those that read a hint read "image", then "image-2" and so on, in their order. Raises UserError where two have
    learned the same word.
    """
    backbone: Any = pipeline.denoiser.backbone
    text, built, found_hashes = pipeline.text, list[Adapter](), dict[str, str]()
    for number, (run, weight) in enumerate(chosen, 1):
        adapter, found_hashes[f"adapter-{number}"] = load_adapter(run, backbone, text, hashes)
        adapter.strength = weight
        built.append(adapter.to(pipeline.device).eval().requires_grad_(False))
        if isinstance(adapter, Words) and weight not in (0, 1) and first_process():
            note(f"{run} is of new words alone, whose weight has no effect but 0: {weight:g} draws as 1 does")
    refuse_same_word([run for run, _ in chosen], built)
    name_hints(built)
    for adapter in sorted(built, key=lambda adapter: bool(adapter.hint)):  # those in place before those around
        backbone, text = adapter.attach(backbone, text)
    merge(backbone, text)  # computed once: strengths are settled
    return replace(pipeline.denoiser, backbone=backbone), text, found_hashes


def refuse_same_word(runs: Sequence[str | Path], adapters: Sequence[Adapter]) -> None:
    """Raises UserError where two of the runs' adapters have learned the same word, of which only one row is read."""
    learned = dict[str, str | Path]()
    for run, adapter in zip(runs, adapters, strict=True):
        own = [word for part in adapter.modules() if isinstance(part, Words) for word in part.words]
        if again := [word for word in own if word in learned]:
            what = f"{learned[again[0]]} and {run} have both learned the word {again[0]!r}"
            hint = "give one of them; learned as another word, with --adapter.words, it is drawn beside the other"
            raise UserError(what, hint=hint, code=CHECKPOINT)
        learned |= dict.fromkeys(own, run)


def name_hints(adapters: Sequence[Adapter]) -> None:
    """Give each of the adapters that read a hint its own: "image", "image-2" and so on."""
    for number, adapter in enumerate((adapter for adapter in adapters if adapter.hint), 1):
        adapter.hint = "image" if number == 1 else f"image-{number}"


def load_adapter(run: str | Path, backbone: Backbone, text: TextEncoder,
                 hashes: Mapping[str, str]) -> tuple[Adapter, str]:
    """The adapter of a run, for the base that it was learned upon, and its content hash.

    Raises UserError where the run is none of an adapter, or the base another.
    """
    found = find(run, "denoiser")
    config = found.config()
    assert isinstance(config, decoding.DenoiserConfig)
    if not is_adapter(config):
        raise UserError(f"{run} is a whole model, not an adapter", hint="give it with --model", code=CHECKPOINT)
    same_base(run, found.final, hashes)
    with as_user_error("give the model that it was learned upon with --model", CHECKPOINT):
        adapter = joined.build(config.adapter, backbone, text)
    tensors = weights(found.weights, "denoiser")
    if not found.finished:
        tensors = {name.removeprefix("adapter."): tensor for name, tensor in tensors.items()}
    fill(adapter, tensors, found.weights)
    return adapter, content_hash(adapter.state_dict())
