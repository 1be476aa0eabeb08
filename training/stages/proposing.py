"""A training without --config: a run that goes on takes its own, any other the proposal for its data and device."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.commands import again
from training.guarding import read_record
from training.machine.launcher import first_process
from training.messages import note
from training.models.text_encoders import SETTINGS, stored_record
from training.runs.folder import record
from training.settings.flags import written_out
from training.settings.recipes import Situation, propose, reasons
from training.shards.addresses import repeat_command
from training.shards.index import read_index
from training.shards.remote import Remote, open_address

if TYPE_CHECKING:
    import argparse

UNSEEN = 64  # pixels a side where no data are named


def settle_config(args: argparse.Namespace, stage: str) -> None:
    """Fill in `args.config`, and the overrides of a proposal under those given; `args.steps_proposed`: whether nobody
    asked for so many steps."""
    args.steps_proposed = "train.max_steps" not in args.overrides
    if take_own(args, stage):
        return
    folder, summary, situation = _found(args, stage)
    found = _of_latents(args, folder, summary) if stage == "denoiser" else {}
    model = _autoencoder(folder) if stage == "denoiser" else None
    proposal = propose(stage, situation, _batch_given(args, situation), model)
    added = {key: text for key, text in {**proposal.overrides, **found}.items() if key not in args.overrides}
    args.config, args.overrides = proposal.pair.name, {**added, **args.overrides}
    if first_process():
        words, _ = again(["--config", args.config, *written_out(added)])
        command, *about = repeat_command(words).split("\nnote: ")
        note("\n      ".join([*reasons(proposal), f"the same as: {command}"]))
        for line in about:
            note(line)


def take_own(args: argparse.Namespace, stage: str) -> bool:
    """Let a run that goes on take its own config; whether there is one."""
    own = Path(args.output or "") / "config.json"
    if not (args.resume and args.output and own.is_file() and record(own.parent).get("stage", stage) == stage):
        return False
    args.config = str(own)
    if first_process():
        note(f"no --config was given: the run's own is used, {own}")
    return True


def _found(args: argparse.Namespace, stage: str) -> tuple[Path | Remote | None, dict[str, Any], Situation]:
    """The folder of data, the summary of its index (empty for a stream of tars), and the situation."""
    from training.machine.processes import resolve

    source = args.data if stage == "autoencoder" else args.latents
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    passes = getattr(args, "gradient_accumulation_steps", None) or 1
    device = resolve(args.device).type
    folder, summary, pictures, resolution = None, {}, None, getattr(args, "resolution", None) or UNSEEN
    if source and not (args.stream and stage == "autoencoder"):
        folder = open_address(source, args.cache_dir, args.cache_size)
        index, infos = read_index(folder)
        summary = {**index["summary"], "fields": index["fields"]}
        pictures = None if args.stream else sum(info.samples for info in infos if info.split == "train")
        resolution = _side(folder, summary)
    return folder, summary, Situation(
        pictures=pictures, resolution=resolution, device=device, processes=processes, unit=processes * passes
    )


def _side(folder: Path | Remote, summary: Mapping[str, Any]) -> int:
    """Pixels of the longer side; of tars indexed in place, by their first picture."""
    if latent := summary.get("latent"):
        height, width = latent["picture"]
        return round(math.sqrt(height * width)) if summary.get("buckets") else int(max(height, width))
    if isinstance(side := summary.get("resolution"), int):
        return side
    from training.data.images import Images
    from training.shards.reading import ShardSet

    return max(Images(ShardSet(folder))[0].data.shape[-2:])


def _batch_given(args: argparse.Namespace, situation: Situation) -> dict[str, str]:
    """What is given, with the global batch that follows from --micro-batch-size alone."""
    micro = args.overrides.get("train.micro_batch_size", "")
    if not micro.isdecimal() or "train.batch_size" in args.overrides:
        return dict(args.overrides)
    return {**args.overrides, "train.batch_size": str(int(micro) * situation.unit)}


def _autoencoder(folder: Path | Remote | None) -> dict[str, Any] | None:
    """The [model] of the autoencoder that lies beside latents."""
    if isinstance(folder, Remote):
        folder.bring(["autoencoder/config.json"])
    path = Path(folder or "") / "autoencoder" / "config.json"
    return read_record(path, {"model": dict})["model"] if folder and path.is_file() else None


def _of_latents(args: argparse.Namespace, folder: Path | Remote | None, summary: Mapping[str, Any]) -> dict[str, str]:
    """What latents offer: mirrored variants, and the text encoder of stored embeddings or the one that is named in
    place of one that learns."""
    mirrored = {"train.flip": "true"} if summary.get("mirrored") else {}
    stored = "text.safetensors" in summary.get("fields", ())
    if not stored and not args.text_encoder:
        return mirrored
    if stored and isinstance(folder, Remote):
        folder.bring(["text_encoder/identity.json"])
    record = stored_record(Path(folder)) if stored and folder else {}
    settings = {f"text.{key}": str(record[key]).lower() for key in SETTINGS if key in record}
    return mirrored | {"text.kind": "huggingface"} | settings
