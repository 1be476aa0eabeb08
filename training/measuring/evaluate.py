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
from training.drawing.prompts import tell_reading
from training.drawing.requests import ask, choose
from training.drawing.steering import pipeline_hashes
from training.errors import UserError
from training.files import finite, write_json
from training.guarding import check_free, make_folder
from training.ledger import Ledger
from training.machine import memory, processes
from training.measuring.classification import classification
from training.measuring.copies import copies
from training.measuring.distances import Moments, frechet_distance, kernel_distance, wilson
from training.measuring.editing import shapes_edits
from training.measuring.features import load_features
from training.measuring.held_out import (
    check_count,
    check_crop,
    chunks,
    even_captions,
    even_indices,
    gather,
    held_out,
    trained_on,
    warn_of_few,
)
from training.measuring.likelihood import likelihood
from training.measuring.obedience import draw_batches, obeyed_by_classifier, sampling_errors, shapes_obedience
from training.measuring.restoration import restoration
from training.messages import answer, tell, warn
from training.models.assembly import load_pipeline
from training.models.autoencoders import autoencoder_hashes, load_autoencoder
from training.models.folders import find
from training.models.judge import load_classifier
from training.models.lpips import load_distance
from training.models.reconstructions import Fidelity, reconstructed
from training.runs.folder import versions
from training.settings import decoding
from training.settings.flags import check_least
from training.shards.index import data_facts
from training.shards.remote import open_address
from training.tensors import content_hash

if TYPE_CHECKING:
    import argparse

KERNEL_SAMPLES = 2000  # the kernel distance compares all pairs


def evaluate(args: argparse.Namespace) -> int:
    """Measure a run of either stage, print a table, write JSON. Returns the exit code."""
    least = {"count": 0, "likelihood": 0, "likelihood_probes": 1, "draws": 1, "samples": 2, "batch_size": 1}
    least |= {"train_count": 0}
    check_least(args, least, f"{door('evaluate --help')} says what it means")
    check_free(args.output, args.overwrite)
    check_free(args.grid, args.overwrite, "--grid")
    memory.keep_memory()
    if args.data:
        args.data = open_address(args.data, args.cache_dir, args.cache_size)
    since = time.perf_counter()
    stage = find(args.model, "denoiser" if args.classify or args.restore or args.copies else None).stage
    numbers = of_autoencoder(args) if stage == "autoencoder" else of_denoiser(args)
    numbers |= {"data": data_facts(args.data) if args.data else None}
    numbers |= {"seconds": round(time.perf_counter() - since, 1), "versions": versions()}
    for key, value in numbers.items():
        if isinstance(value, int | float | str):
            answer(f"{key:38} {value:.4f}" if isinstance(value, float) else f"{key:38} {value}")
    if args.output:
        make_folder(Path(args.output).parent)
        write_json(Path(args.output), finite(numbers))
        tell(f"wrote {args.output}")
    return 0


def of_autoencoder(args: argparse.Namespace) -> dict[str, Any]:
    """Stage one on held-out pictures: PSNR, SSIM, LPIPS where asked, Frechet distance of reconstructions."""
    device = processes.resolve(args.device)
    model = load_autoencoder(args.model, device)
    images, features = held_out(args), load_features(args.features, device)
    network, places = load_distance(args, images, device), images.evenly(args.count)
    check_count(len(places))
    check_crop(args.crop, images)
    few = warn_of_few(features.dim, len(places))
    fidelity, real, ours = Fidelity(network), Moments(features.dim), Moments(features.dim)
    for pixels in chunks(images, places, device):
        made = reconstructed(model, pixels)
        real.add(features(pixels))
        ours.add(features(made))
        fidelity.add(made, pixels, args.crop or 0)
    return {
        **fidelity.means(),
        "frechet": frechet_distance(real, ours),
        "images": real.count,
        "features": features.name,
        "lpips_network": f"{args.lpips_net}, {_weights(args.lpips)} weights, {_short(network)}" if network else None,
        "crop": args.crop or 0,
        "hashes": autoencoder_hashes(model),
        **few,
    }


def _weights(lpips: str) -> str:
    return lpips if lpips in ("standard", "random") else "given"


def _short(network: torch.nn.Module) -> str:
    return content_hash(network.state_dict())[:12]


def of_denoiser(args: argparse.Namespace) -> dict[str, Any]:
    """Stage two: generated against held-out pictures, and how far captions are obeyed."""
    measured = (args.data, args.likelihood, args.classify, args.restore, args.edits, args.obedience == "shapes")
    measured += (args.copies,)
    if not any(measured):
        raise UserError("nothing to measure", hint="give --data DIR, --obedience shapes or --edits shapes")
    device = processes.resolve(args.device)
    pipeline = load_pipeline(args.model, device, args.text_encoder)
    sampling, settings = choose(args)
    pipeline = replace(pipeline, size=tuple(settings["sample"]["size"]))
    numbers: dict[str, Any] = {"settings": settings, "seed": args.seed, "batch_size": args.batch_size}
    numbers |= {"hashes": pipeline_hashes(pipeline)}
    ledger = Ledger()
    read = {"operator", "measurement", "posterior"} if args.restore else set()
    for key in args.overrides:
        if key.partition(".")[0] in decoding.sections("editing").keys() - read:
            ledger.add("ignored", "keys that nothing of this measurement reads", f"--{key}")
    if args.obedience == "shapes" and not args.restore:
        numbers |= shapes_obedience(pipeline, sampling, args, ledger)
    if args.edits:
        numbers |= shapes_edits(pipeline, sampling, args)
    if args.classify:
        numbers |= classification(pipeline, args, device, ledger)
    elif args.copies:
        numbers |= copies(pipeline, sampling, args, device, ledger)
    elif args.restore:
        numbers |= restoration(pipeline, sampling, args, device, ledger)
    elif args.likelihood:
        with sampling_errors():
            numbers |= likelihood(pipeline, sampling, args, device, ledger)
    elif args.data:
        numbers |= distances(pipeline, sampling, args, device, ledger)
    for line in ledger.lines():
        warn(line)
    return numbers | {"ledger": ledger.report()}


def distances(
    pipeline: Any, sampling: Any, args: argparse.Namespace, device: torch.device, ledger: Ledger
) -> dict[str, Any]:
    """Frechet and kernel distance of `count` generated pictures to the held-out ones, captions evenly from theirs."""
    images, features = held_out(args), load_features(args.features, device)
    train = trained_on(args.data)
    judge = load_classifier(args.obedience, device) if args.obedience not in (None, "shapes") else None
    count = args.count or len(images)
    smallest = min(count, len(images), len(train) if train else count)
    check_count(smallest)
    few = warn_of_few(features.dim, smallest)
    requests = ask(even_captions(images, count), 1, args.seed)
    tell_reading((request.prompt for request in requests), ledger, pipeline.text, aloud=False)
    verdicts: list[bool] = []

    def judged() -> Iterator[Tensor]:
        for pixels, captions in draw_batches(pipeline, sampling, requests, args.batch_size):
            verdicts.extend(obeyed_by_classifier(judge, pixels, captions) if judge else [])
            yield pixels

    held = chunks(images, even_indices(images, count), device, "reconstructing")
    copies = (reconstructed(pipeline.autoencoder, pixels) for pixels in held)
    real, real_rows = gather(features, chunks(images, range(len(images)), device))
    sets = {
        "generated": gather(features, judged()),
        "reconstructed": gather(features, copies),
    }
    if train:
        sets["training"] = gather(
            features, chunks(train, even_indices(train, count), device, "measuring training pictures")
        )
    numbers: dict[str, Any] = {f"frechet_{name}": frechet_distance(real, found) for name, (found, _) in sets.items()}
    numbers["frechet_ratio"] = numbers["frechet_generated"] / max(1e-12, numbers["frechet_reconstructed"])
    numbers |= {"features": features.name, "pictures": len(requests), "real_pictures": real.count}
    numbers |= {f"{name}_pictures": found.count for name, (found, _) in sets.items() if name != "generated"} | few
    kernel = real_rows[:: max(1, len(images) // KERNEL_SAMPLES)], sets["generated"][1][:KERNEL_SAMPLES]
    numbers |= {"kernel_distance": kernel_distance(*kernel)}
    numbers |= {"kernel_real_pictures": len(kernel[0]), "kernel_pictures": len(kernel[1])}
    if judge:
        numbers |= {"obedience": sum(verdicts) / len(verdicts), "obedience_judge": f"classifier {_short(judge)}"}
        numbers["obedience_95"] = list(wilson(sum(verdicts), len(verdicts)))
    return numbers
