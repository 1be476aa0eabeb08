"""What a training upon another model shares with it: the autoencoder, a frozen text encoder, the size of pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.commands import door
from training.errors import CHECKPOINT, UserError
from training.machine.launcher import first_process
from training.messages import note
from training.models import text_encoders
from training.runs.ingredients import difference

if TYPE_CHECKING:
    import argparse

    from training.data.latents import Latents


def in_size_of(config: Any, theirs: Any, dataset: Latents, role: str = "base") -> Any:
    """The config, drawn in the size of these latents where it says no other than that of the other model, its `role`.
    """
    sample, size = config.sample, tuple(dataset.shards.summary["latent"]["picture"])
    if sample.size != theirs.sample.size or sample.size in ((0, 0), size):
        return config
    now, before = ("x".join(map(str, sides)) for sides in (size, sample.size))
    if first_process():
        note(f"sample.size is {now}, as these latents are, and {before} in the {role}")
    return dataclasses.replace(config, sample=dataclasses.replace(sample, size=size))


def same_autoencoder(model: str, base: Mapping[str, Any], ours: Mapping[str, str], role: str = "base") -> None:
    """Raises UserError where the latents are not those of the model, a `role` of this training."""
    if base.get("autoencoder", ours["autoencoder"]) != ours["autoencoder"]:
        own, other = base["autoencoder"][:12], ours["autoencoder"][:12]
        what = f"the {role} {model} draws with autoencoder {own}, the latents were made by {other}"
        place = f"{role.upper()}/final/autoencoder"
        again = door("encode_latents", "--autoencoder", place, "--data", "PICTURES", "--output", "DIR")
        raise UserError(what, hint=f"encode the pictures with that of the {role}: {again}", code=CHECKPOINT)


def text_encoder_of(args: argparse.Namespace, dataset: Latents, final: Path, role: str = "base") -> str | None:
    """What a frozen text encoder is loaded from: as given, else that of the model in `final`; nothing where its
    embeddings are stored. Raises UserError where those are of another one."""
    if not dataset.text:
        return args.text_encoder or text_encoders.stored_whole(final)
    stored, theirs = (text_encoders.stored_record(folder) for folder in (Path(args.latents), final))
    if change := difference(theirs, stored, ["hash"] if theirs else []):
        what = f"the {role} reads captions by text encoder {change.before}, the embeddings of these latents are of"
        home = f"{role.upper()}/final"
        with_its = "--text-encoder", f"{home}/text_encoder", "--autoencoder", f"{home}/autoencoder"
        again = door("encode_latents", *with_its, "--data", "PICTURES", "--output", "DIR")
        raise UserError(f"{what} {change.now}", hint=f"encode them again: {again}", code=CHECKPOINT)
    given: str | None = args.text_encoder
    return given
