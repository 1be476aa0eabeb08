"""Images encoded to latents, shard by shard: un-normalised moments, captions, text embeddings where asked for."""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autoencoder.tiles import encode_tiled
from ldm.representation import VISION
from training.commands import door
from training.data.images import Images
from training.data.latents import Latents
from training.encoding.ahead import read_ahead
from training.encoding.plan import claim, sample_bytes, told_from
from training.encoding.shard import Encoder, embeddings, refuse_many
from training.encoding.shown import hint_beside, planned, said, trained
from training.errors import DATA, UserError, as_user_error
from training.files import write_json
from training.guarding import check_output, disk_error, make_folder, read_record, refuse_links
from training.ledger import Ledger
from training.machine import launcher, meeting, processes
from training.machine.faults import fault
from training.messages import tell, warn
from training.models import text_encoders
from training.models.autoencoders import autoencoder_hashes, check_tile, finished_autoencoder, load_autoencoder
from training.models.folders import copy_model
from training.models.vision import load_features, vision_hash
from training.models.vocabulary import count_captions
from training.next_step import again, beside, tell_next
from training.progress import Progress
from training.shards.claims import claimed
from training.shards.index import ShardInfo, commonest, is_mixed, listed_shard, read_index, sizes_of, write_index
from training.shards.indexing import latents_summary
from training.shards.reading import ShardSet
from training.shards.remote import NULL, Remote, open_address
from training.shards.writing import sound_shard, write_shard
from training.tensors import save_tensors

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from torch import Tensor

    from autoencoder.base import Autoencoder
    from ldm.text import TextEncoder

DEAD = 1e-4  # standard deviation of a channel that says nothing
PROBED = 256  # latents looked at for dead channels


def encode(args: argparse.Namespace) -> int:
    """Encode every shard of a data set; several processes share the shards. Restartable: sound shards are kept."""
    _check(args)
    args.mixed_precision = launcher.precision(args.mixed_precision, ("no", "bf16"))
    accelerator = processes.start(args.device, autocasts=True)
    source, target = open_address(args.data, args.cache_dir, args.cache_size), Path(args.output)
    args.data = source  # which shows no secrets where it is told
    check_output(target)
    index, shards = read_index(source)
    home = finished_autoencoder(args.autoencoder)
    model = load_autoencoder(args.autoencoder, accelerator.device)
    encoder = _text_encoder(args, target, accelerator.device)
    vision = load_features(args.vision).to(accelerator.device) if args.vision else None
    plan = _plan(index["summary"], shards, model, encoder, args)
    plan[VISION] = {"hash": vision_hash(vision)["weights"], "width": vision.width} if vision else None
    meeting.agree(plan | {"data": sha256(json.dumps(plan["data"], sort_keys=True).encode()).hexdigest()})
    total = sum(s.samples for s in shards)
    with ExitStack() as held:
        if accelerator.is_main_process:
            make_folder(target)
            refuse_links(target)
            held.enter_context(claimed(target))
            _prepare(target, plan, total, home, encoder, args)
        meeting.meet()  # no process writes a shard before the folder is claimed for this plan
        tiled = partial(encode_tiled, model, tile=args.tile, overlap=args.tile // 4)
        encoded = tiled if args.tile else model.encode
        seen = partial(_features, vision, plan["latent"]["factor"]) if vision else None
        worker = Encoder(encoded, encoder, args, accelerator.device, plan, total, model.norm.mean_latents, seen)
        own = shards[accelerator.process_index :: accelerator.num_processes]
        there = _write(worker, source, target, own, args, aloud=accelerator.is_main_process)
        write_json(_part(target, accelerator.process_index), [info.listed() for info in there])
        meeting.meet()  # the index lists the shards of all processes
        if accelerator.is_main_process:
            infos = _parts(target, accelerator.num_processes)
            left_out = _finish(source, target, plan, shards, infos, model.latent_channels, worker.waiting())
            if left_out and args.on_bad_data is None:
                raise unasked(left_out, total, target)
            tell_next(_training(args, target, plan["image"]))
        meeting.meet()
    return 0


def _plan(
    summary: dict[str, Any], shards: list[ShardInfo], model: Autoencoder, encoder: TextEncoder | None, args: Any
) -> dict[str, Any]:
    """All that decides what the latents are."""
    latent, hint = latent_of(shards, _images(args.data, shards[0].split, args), model, args.dtype), hint_beside(summary)
    image = planned(args, hint, sizes_of(shards) or [tuple(latent["picture"])], model)
    return {
        **{str(name): summary[name] for name in ("buckets", "framed") if name in summary},
        "encoder": autoencoder_hashes(model)["encoder"],
        "data": {s.name: s.sha256 for s in shards},
        "latent": latent,
        "flip": args.flip, "tile": args.tile, "precision": args.mixed_precision,
        "text_encoder": text_encoders.identity(encoder)["hash"] if encoder else None,
        "hint": None if image and image["kind"] == "low-res" else hint,
        "image": image,
    }


def _training(args: argparse.Namespace, target: Path, image: dict[str, Any] | None) -> str:
    """The training of a denoiser on what was encoded."""
    words = ["--latents", target, "--output", beside(target, "denoiser")]
    words += [*trained(image), *again({"device": args.device, "train.flip": "true" if args.flip else ""})]
    words += again({"representation.kind": "repa" if args.vision else ""})
    if args.text_encoder:
        words += ["--text.kind", "huggingface", "--text.length", args.text_length, "--text.pooling", args.text_pooling]
        words += again({"text.lower": "true" if args.text_lower else "", "text-encoder": args.text_encoder})
    return door("train_denoiser", *words)


def _check(args: argparse.Namespace) -> None:
    check_tile(args.tile)
    if args.num_workers < 0:
        raise UserError(f"--num-workers: must be >= 0 (got {args.num_workers})")


def unasked(left_out: int, total: int, target: Path) -> UserError:
    """What an encoding ends with that left samples out, where nobody had asked for it."""
    what = f"{left_out:,} of {total:,} samples could not be read; {target} is whole without them"
    hint = "mend and pack them again; or take it as it is: the same command with --on-bad-data skip"
    return UserError(what, hint=hint, code=DATA)


def _write(
    worker: Encoder, source: Path | Remote, target: Path, shards: list[ShardInfo], args: argparse.Namespace, *,
    aloud: bool,
) -> list[ShardInfo]:
    """Encode the shards that are not there yet; returns all that are there then, without those of no sample."""
    there = [info for shard in shards if (info := _sound(target, shard))]
    kept = {info.name for info in there}
    waiting = {info.name: info for info in shards if info.name not in kept}
    share = sum(info.samples for info in shards)
    where = "" if share == worker.total else " in the first process"  # which alone speaks, and knows its own shards
    told = Progress(f"encoding{where}", share, aloud=aloud)
    told.skip(sum(info.samples for info in shards if info.name not in waiting))
    if aloud and len(shards) > len(waiting):
        tell(f"kept{where}: {len(shards) - len(waiting)} of {len(shards)} shards, which are there")
    splits = {split: _images(source, split, args) for split in {info.split for info in waiting.values()}}
    pictures = read_ahead(splits, list(waiting.values()), args.num_workers, args.batch_size)
    for info in waiting.values():
        meeting.watch()  # shards may take hours, and who was left alone must end before the same command is run again
        fault("shard")
        samples = told.each(worker.samples(splits[info.split].shards, info, pictures), lambda sample: 1)
        # The first sample is taken before the file is begun, for a shard of none is refused. All others are encoded
        # while they are written: memory holds a batch, not a shard.
        if first := next(samples, None):
            stem = info.name.removesuffix(".tar")
            there.append(write_shard(target, stem, chain([first], samples), info.split, info.size))
        # Beside its shard until all are there: one that is gone on with must not forget what was not used.
        write_json(_ledger_of(target, info), worker.ledger.report())
    return there


def _sound(target: Path, info: ShardInfo) -> ShardInfo | None:
    """The latents of a shard of pictures, if they are there whole; of the same split, whatever the shard is called."""
    return sound_shard(target, info.name.removesuffix(".tar"), info.split, info.size)


def _features(vision: Callable[..., Any], factor: int, images: Tensor) -> Any:
    """Features of images (B, 3, H, W), one for each of their latents."""
    return vision(images, (images.shape[-2] // factor, images.shape[-1] // factor))


def _part(target: Path, rank: int | str) -> Path:
    """Where a process says which shards of its share are there: it has just hashed them, and none is read again."""
    return target / f".encoded-{rank}.json"


def _parts(target: Path, processes: int) -> list[ShardInfo]:
    """What all processes say is there, by name."""
    rows = [row for rank in range(processes) for row in json.loads(_part(target, rank).read_bytes())]
    return sorted((listed_shard(row) for row in rows), key=lambda info: info.name)


def _ledger_of(target: Path, info: ShardInfo) -> Path:
    return target / f".{info.name}.ledger.json"


def _images(source: Path | Remote, split: str, args: argparse.Namespace) -> Images:
    return Images(ShardSet(source, split), on_bad_data=args.on_bad_data or "skip")


def _text_encoder(args: argparse.Namespace, target: Path, device: torch.device) -> TextEncoder | None:
    if not args.text_encoder:
        return None
    from ldm.text import HuggingFace

    with as_user_error("change --text-length"):
        config = HuggingFace(length=args.text_length, pooling=args.text_pooling, lower=args.text_lower)
    return text_encoders.load_as_stored(config, args.text_encoder, text_encoders.stored_record(target)).to(device)


def _prepare(
    target: Path, plan: dict[str, Any], total: int, home: Path, encoder: TextEncoder | None, args: argparse.Namespace
) -> None:
    """Claim the folder, and put beside the latents what they are made with. Raises UserError where they do not fit."""
    present = sum(path.stat().st_size for path in target.glob("*.tar"))
    check_output(target, total * sample_bytes(plan, flip=args.flip) - present)
    # Claimed before anything is put there: a folder of other latents is refused as it was.
    claim(target, plan, told_from(args.data, target))
    try:
        copy_model(home, target / "autoencoder")
        if encoder:
            text_encoders.keep(encoder, args.text_encoder, target)
            save_tensors(target / NULL, embeddings(encoder, [""])[0])
    except OSError as failure:
        raise disk_error(target, failure) from None


def latent_of(shards: list[ShardInfo], images: Images, model: Autoencoder, dtype: str) -> dict[str, Any]:
    """What one stored latent is: shape, type, and the size of its picture; in buckets, that of the commonest."""
    picture = commonest(shards) or (images[0].data.shape[2], images[0].data.shape[3])
    with as_user_error("pack the pictures again with another --resolution, or --bucket-step", DATA):
        for size in sizes_of(shards) or [picture]:
            model.check_images(torch.empty(1, images.channels, *size, device="meta"))
    shape = [model.latent_channels * (2 if model.norm.gaussian else 1), *(side // model.factor for side in picture)]
    return {"shape": shape, "dtype": dtype, "picture": list(picture), "factor": model.factor}


def _finish(
    source: Path | Remote, target: Path, plan: dict[str, Any], shards: list[ShardInfo], infos: list[ShardInfo],
    channels: int, waiting: float,
) -> int:
    """Write the index of what is there; returns how many samples of `shards` were left out."""
    ledger, ledgers = _ledgers(target, shards)
    summary = latents_summary(plan)
    samples, total = sum(s.samples for s in shards), sum(info.samples for info in infos)
    if samples > total:
        refuse_many(samples - total, samples, str(source))
        summary["left_out"] = samples - total
    summary |= {"order": "mixed" if is_mixed(read_index(source)[0]["summary"]) else "source"}
    summary |= {"ledger": ledger.report(), "ledgers": ledgers}
    write_index(target, infos, summary, kind="latents")  # last of the data: a folder without is refused
    for path in (*(_ledger_of(target, shard) for shard in shards), *target.glob(_part(Path(), "*").name)):
        path.unlink(missing_ok=True)
    if any(info.split == "train" for info in infos):
        count_captions(Latents(ShardSet(target)))
    if dead := _dead_channels(ShardSet(target, infos[0].split), channels):
        warn(f"latent channels {dead} hardly vary (std below {DEAD:g})")
    others = len(sizes_of(infos)[1:])
    shape = "x".join(map(str, plan["latent"]["shape"])) + f" and {others} other shapes" * bool(others)
    gap = f", {samples - total:,} left out" if samples > total else ""
    hints = said(plan)
    tell(f"latents: {target} ({total:,} samples of {shape}{gap}{hints}), waiting for data {waiting:.0%}")
    for line in ledger.lines():
        tell(line)
    return samples - total


def _ledgers(target: Path, shards: list[ShardInfo]) -> tuple[Ledger, dict[str, Any]]:
    """What was not used as it was given: of all, and by shard, where anything was. A shard that is encoded again has a
    new one in place of that in the index; the one of all that earlier versions wrote stays, under no name."""
    before: dict[str, Any] = {}
    with suppress(UserError):
        before = read_index(target)[0]["summary"]
    ledger, by_shard = Ledger(), before.get("ledgers", {"": before.get("ledger", {})})
    for shard in shards:
        if (path := _ledger_of(target, shard)).is_file():
            by_shard[shard.name] = read_record(path, {})
    by_shard = {name: report for name, report in by_shard.items() if report}
    for report in by_shard.values():
        ledger.merge(report)
    return ledger, by_shard


def _dead_channels(shards: ShardSet, channels: int) -> list[int]:
    """The channels whose mean hardly varies over some latents: the autoencoder leaves them unused."""
    latents = Latents(shards)
    some = range(0, len(shards), max(1, len(shards) // PROBED))
    values = [latents.moments(i)[:channels].reshape(channels, -1) for i in some]
    return np.flatnonzero(np.concatenate(values, 1).astype(np.float64).std(1) < DEAD).tolist()
