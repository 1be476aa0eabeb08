"""The data of a training with `--stream`: what is read as it comes, what is held out, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.images import Images
from training.data.latents import Latents
from training.errors import UserError
from training.messages import note
from training.pictures.formats import FIELDS
from training.shards.addresses import redact
from training.shards.index import read_index
from training.shards.remote import Remote
from training.shards.streaming import StreamedShards, hold_out, streamed_tars

if TYPE_CHECKING:
    import argparse

    from training.settings.sections import Train

TOLD = "--stream reads samples as they come: a resumed run reads others than a run that was not stopped"


def stream_images(args: argparse.Namespace, train: Train, how: dict[str, Any]) -> tuple[Images, Images]:
    """(training, held-out) pictures of a stream of tars, fitted to `--resolution`."""
    if not args.resolution or args.resolution < 8:
        what = "--resolution is missing" if args.resolution is None else "--resolution: must be at least 8"
        raise UserError(what, hint="pictures of a --stream are fitted to it: --resolution 64, say")
    tars = streamed_tars(args.data)
    stream, kept, held = hold_out(tars, train.validation_size or 512, train.seed, args.shuffle_buffer)
    note(f"{TOLD}; {len(held)} pictures are held out for validation, {len(kept)} at its front give the latents' scale")
    training = Images(StreamedShards(stream, kept, FIELDS), resolution=args.resolution, **how)
    return training, Images(StreamedShards(stream, held, FIELDS, split="val"), resolution=args.resolution)


def stream_latents(args: argparse.Namespace, train: Train, how: dict[str, Any]) -> tuple[Latents, Latents]:
    """(training, held-out) latents of a folder or address that holds an index, its shards read from front to end."""
    index, infos = read_index(args.latents)
    if any(info.size for info in infos):
        what = "--stream reads samples as they come, and a batch is of one bucket: these latents are in several"
        raise UserError(what, hint="leave --stream out, and name a folder of shards")
    remote = args.latents if isinstance(args.latents, Remote) else None
    base = remote.address.rstrip("/") if remote else str(args.latents)
    tars = [f"{base}/{info.name}" for info in infos if info.split in ("train", "val")]
    stream, kept, held = hold_out(tars, train.validation_size or 512, train.seed, args.shuffle_buffer)
    note(f"{TOLD}; {len(held)} latents are held out for validation")
    facts: dict[str, Any] = {"summary": index["summary"], "directory": Path(args.latents), "remote": remote}
    fields = tuple(index["fields"])
    training = Latents(StreamedShards(stream, kept, fields, **facts), **how)
    held_out = StreamedShards(stream, held, fields, split="val", **facts)
    return training, Latents(held_out, sizes=how["sizes"])


def stream_facts(dataset: Images) -> dict[str, Any]:
    """What names the data of a run that reads a stream: the tars, by name."""
    return {"stream": [redact(tar) if "://" in tar else tar for tar in dataset.shards.stream.tars]}
