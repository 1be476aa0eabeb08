"""The work of `evaluate`: numbers for a run of either stage, with all they depend on beside them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.commands import door
from training.drawing import adapters
from training.drawing.requests import choose
from training.drawing.shown import shown
from training.drawing.steering import pipeline_hashes, refuse_untaught
from training.errors import UserError
from training.files import finite, write_json
from training.guarding import check_free, make_folder
from training.ledger import Ledger
from training.machine import memory, processes
from training.measuring import bootstrap, measures
from training.measuring.classification import classification
from training.measuring.control import control
from training.measuring.copies import copies
from training.measuring.editing import shapes_edits
from training.measuring.features import load_features
from training.measuring.generated import distances
from training.measuring.held_out import check_crop, chunks, held_out, warn_of_few
from training.measuring.likelihood import likelihood
from training.measuring.obedience import sampling_errors, shapes_obedience
from training.measuring.protocol import card, protocol, protocol_hash
from training.measuring.restoration import restoration
from training.measuring.upscaling import upscaled
from training.messages import answer, tell, warn
from training.models.assembly import HashedPipeline, load_pipeline
from training.models.autoencoders import autoencoder_hashes, load_autoencoder
from training.models.folders import find
from training.models.lpips import load_distance
from training.models.reconstructions import Fidelity, reconstructed
from training.next_step import encoding, tell_next
from training.runs.folder import versions
from training.settings import decoding
from training.settings.flags import check_least
from training.shards.index import data_facts
from training.shards.reading import COMPARED, held_out_split
from training.shards.remote import open_address
from training.tensors import content_hash

if TYPE_CHECKING:
    import argparse


def evaluate(args: argparse.Namespace) -> int:
    """Measure a run of either stage, print a table, write JSON. Returns the exit code."""
    least = {"count": 0, "likelihood": 0, "likelihood_probes": 1, "draws": 1, "samples": 2, "batch_size": 1}
    least |= {"train_count": 0}
    check_least(args, least, f"{door('evaluate --help')} says what it means")
    check_free(args.output, args.overwrite)
    check_free(args.grid, args.overwrite, "--grid")
    memory.keep_memory()
    given = args.data
    if args.data:
        args.data = open_address(args.data, args.cache_dir, args.cache_size)
    since = time.perf_counter()
    of_drawings = (args.classify, args.restore, args.upscale, args.copies, args.hints, args.adapter)
    model = find(args.model, "denoiser" if any(of_drawings) else None)
    numbers = of_autoencoder(args) if model.stage == "autoencoder" else of_denoiser(args)
    numbers |= {"data": data_facts(args.data) if args.data else None}
    numbers |= {"seconds": round(time.perf_counter() - since, 1), "versions": versions()}
    stated = protocol(numbers, held_out_split(args.data) if args.data else None)
    answer(*table(numbers), *card(stated))
    numbers |= {"protocol_hash": protocol_hash(stated), "protocol": stated}
    if args.output:
        make_folder(Path(args.output).parent)
        write_json(Path(args.output), finite(numbers))
        tell(f"wrote {args.output}")
    if model.stage == "autoencoder" and model.finished:
        tell_next(encoding(args.model, given, {"device": args.device, "cache-dir": args.cache_dir}))
    return 0


def table(numbers: dict[str, Any]) -> Iterator[str]:
    """Every plain number or text, its 95 % interval beside it."""
    for key, value in numbers.items():
        if isinstance(value, int | float | str) and not key.endswith("_resamples"):
            low, high = numbers.get(f"{key}_95") or (None, None)
            interval = f"  ({low:.4f} to {high:.4f})" if low is not None and high is not None else ""
            yield f"{key:38} {value:.4f}{interval}" if isinstance(value, float) else f"{key:38} {value}"


def of_autoencoder(args: argparse.Namespace) -> dict[str, Any]:
    """Stage one on held-out pictures: PSNR, SSIM, LPIPS where asked, Frechet distance of reconstructions."""
    device = processes.resolve(args.device)
    model = load_autoencoder(args.model, device)
    images, features = held_out(args), load_features(args.features, device)
    network, places = load_distance(args, images, device), images.evenly(args.count)
    check_crop(args.crop, images)
    if args.clip:
        warn("--clip scores pictures drawn from captions; an autoencoder draws none")
    fidelity = Fidelity(network)
    real, ours = list[Tensor](), list[Tensor]()
    for pixels in chunks(images, places, device):
        made = reconstructed(model, pixels)
        real.append(features(pixels).cpu())
        ours.append(features(made).cpu())
        fidelity.add(made, pixels, args.crop or 0)
    numbers: dict[str, Any] = fidelity.means() | intervals(fidelity)
    if len(places) >= COMPARED:
        pair = measures.Pair(torch.cat(real), torch.cat(ours), args.seed, paired=True)
        numbers |= measures.compare(features, pair, str) | warn_of_few(features.dim, len(places))
    else:
        few = f"sets of fewer than {COMPARED} pictures"
        warn(f"distances between {few} say nothing and are left out (got {len(places)})")
    return numbers | {
        "images": len(places),
        "features": features.name,
        "network": features.about(),
        "lpips_network": f"{args.lpips_net}, {_weights(args.lpips)} weights, {_short(network)}" if network else None,
        "crop": args.crop or 0,
        "hashes": autoencoder_hashes(model),
    }


def intervals(fidelity: Fidelity) -> dict[str, list[float]]:
    """The 95 % interval of each mean over pictures; of infinite ones (equal pictures) there is none."""
    means = fidelity.means()
    finite_ones = {name: values for name, values in fidelity.values().items() if values.isfinite().all()}
    return {f"{name}_95": bootstrap.around(means[name], bootstrap.of_mean(v)) for name, v in finite_ones.items()}


def _weights(lpips: str) -> str:
    return lpips if lpips in ("standard", "random") else "given"


def _short(network: torch.nn.Module) -> str:
    return content_hash(network.state_dict())[:12]


def refuse_unshown(pipeline: HashedPipeline, args: argparse.Namespace) -> None:
    """Raises UserError where the model or a control at work in it is shown what this measurement does not give."""
    shown(pipeline, "low-res" if args.upscale else "hint" if args.hints else "")
    if not args.hints and any(branch.strength for branch in getattr(pipeline.denoiser.backbone, "branches", ())):
        hint = "give --hints, and --data of pictures that were packed with --hint; or leave the control out"
        raise UserError("a control draws by hints, which only --hints shows it", hint=hint)


def of_denoiser(args: argparse.Namespace) -> dict[str, Any]:
    """Stage two: generated against held-out pictures, and how far captions are obeyed."""
    instead = (args.likelihood, args.classify, args.restore, args.upscale, args.copies, args.hints)
    if not any((*instead, args.data, args.edits, args.obedience == "shapes")):
        raise UserError("nothing to measure", hint="give --data DIR, --obedience shapes or --edits shapes")
    device = processes.resolve(args.device)
    pipeline = load_pipeline(args.model, device, args.text_encoder, adapters=adapters.chosen(args))
    refuse_unshown(pipeline, args)
    sampling, settings = choose(args)
    if not (args.likelihood or args.classify):
        refuse_untaught(pipeline, sampling)
    pipeline = replace(pipeline, size=tuple(settings["sample"]["size"]))
    numbers: dict[str, Any] = {"settings": settings, "seed": args.seed, "batch_size": args.batch_size}
    numbers |= {"hashes": pipeline_hashes(pipeline), "adapters": adapters.facts(args)}
    ledger = Ledger()
    read = {"operator", "measurement", "posterior"} if args.restore else set()
    for key in args.overrides:
        if key.partition(".")[0] in decoding.sections("editing").keys() - read:
            ledger.add("ignored", "keys that nothing of this measurement reads", f"--{key}")
    if args.clip and (any(instead) or not args.data):
        ledger.add("ignored", "flags that nothing of this measurement reads", "--clip")
    if args.obedience == "shapes" and not (args.restore or args.upscale or args.hints):
        numbers |= shapes_obedience(pipeline, sampling, args, ledger)
    if args.edits:
        numbers |= shapes_edits(pipeline, sampling, args)
    if args.classify:
        numbers |= classification(pipeline, args, device, ledger)
    elif args.copies:
        numbers |= copies(pipeline, sampling, args, device, ledger)
    elif args.hints:
        numbers |= control(pipeline, sampling, args, ledger)
    elif args.restore:
        numbers |= restoration(pipeline, sampling, args, device, ledger)
    elif args.upscale or args.likelihood:
        with sampling_errors():
            numbers |= (upscaled if args.upscale else likelihood)(pipeline, sampling, args, device, ledger)
    elif args.data:
        numbers |= distances(pipeline, sampling, args, device, ledger)
    for line in ledger.lines():
        warn(line)
    return numbers | {"ledger": ledger.report()}

