"""The work of scripts/evaluate.py: numbers for a run of either stage, with all they depend on beside them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoencoder.fidelity import psnr, ssim
from autoencoder.images import to_uint8, to_unit
from ldm.likelihood import bits_per_dim, log_likelihood
from ldm.noise import Noise
from ldm.variational import bound
from training import launch
from training.asking import ask, choose
from training.classifier import caption, load_classifier
from training.cli import check_least
from training.data import Images
from training.errors import CHECKPOINT, UserError, explained
from training.features import Features, load_features
from training.files import content_hash, read_json, write_json
from training.inspection import load_distance
from training.metrics import Moments, frechet_distance, kernel_distance, wilson
from training.obedience import SAMPLING, drawn, named, shapes_obedience
from training.remote import located
from training.runs import autoencoder_hashes, load_autoencoder, versions
from training.settle import data_facts
from training.shards import ShardSet
from training.system import load_pipeline, pipeline_hashes

if TYPE_CHECKING:
    import argparse

CHUNK = 100
KERNEL_SAMPLES = 2000  # the kernel distance compares all pairs


def evaluate(args: argparse.Namespace) -> int:
    """Measure a run of either stage, print a table, write JSON. Returns the exit code."""
    least = {"count": 0, "likelihood": 0, "likelihood_probes": 1, "batch_size": 1}
    check_least(args, least, "evaluate.py --help says what it means")
    launch.keep_memory()
    if args.data:
        args.data = located(args.data, args.cache_dir, args.cache_size)
    since = time.perf_counter()
    values = read_json(find_any(args.model) / "config.json")
    numbers = of_autoencoder(args) if "model" in values else of_denoiser(args)
    numbers |= {"data": data_facts(args.data) if args.data else None}
    numbers |= {"seconds": round(time.perf_counter() - since, 1), "versions": versions()}
    for key, value in numbers.items():
        if isinstance(value, int | float | str):
            print(f"{key:38} {value:.4f}" if isinstance(value, float) else f"{key:38} {value}")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.output), numbers)
        print(f"wrote {args.output}", file=sys.stderr)
    return 0


def find_any(model: str) -> Path:
    """The folder of the config of a run, its final/ or a checkpoint, whichever its stage."""
    path = Path(model)
    for place in (path / "final", path, path.parent.parent if path.parent.name == "checkpoints" else path):
        if (place / "config.json").is_file():
            return place
    raise UserError(f"{path}: no such run", hint="give a run folder, its final/ or a checkpoint", code=CHECKPOINT)


def of_autoencoder(args: argparse.Namespace) -> dict[str, Any]:
    """Stage one on held-out pictures: PSNR, SSIM, LPIPS where asked, Frechet distance of reconstructions."""
    device = launch.resolve(args.device)
    model = load_autoencoder(args.model, device)
    images, features = held_out(args), load_features(args.features, device)
    network, places = load_distance(args, images, device), images.first(args.count)
    enough(len(places))
    check_crop(args.crop, images)
    rows: dict[str, list[Tensor]] = {name: [] for name in ("psnr", "ssim", *(["lpips"] if network else []))}
    real, ours = Moments(features.dim), Moments(features.dim)
    for pixels in chunks(images, places, device):
        made = _reconstruct(model, pixels)
        real.add(features(pixels))
        ours.add(features(made))
        inner, outer = crop(made, args.crop), crop(pixels, args.crop)
        rows["psnr"].append(psnr(inner, outer))
        rows["ssim"].append(ssim(inner, outer))
        if network:
            with torch.no_grad():
                rows["lpips"].append(network(to_unit(made), to_unit(pixels)))
    means = {name: torch.cat(parts).double().mean().item() for name, parts in rows.items()}
    return {
        **means,
        "frechet": frechet_distance(real, ours),
        "images": real.count,
        "features": features.name,
        "lpips_network": f"{args.lpips_net}, {_weights(args.lpips)} weights, {_short(network)}" if network else None,
        "crop": args.crop or 0,
        "hashes": autoencoder_hashes(model),
    }


def _weights(lpips: str) -> str:
    return lpips if lpips in ("standard", "random") else "given"


def _short(network: torch.nn.Module) -> str:
    return content_hash(network.state_dict())[:12]


@torch.no_grad()
def _reconstruct(model: Any, pixels: Tensor) -> Tensor:
    """Pictures through the posterior's mean, 8-bit."""
    return to_uint8(model(to_unit(pixels), None)[0])


def of_denoiser(args: argparse.Namespace) -> dict[str, Any]:
    """Stage two: generated against held-out pictures, and how far captions are obeyed."""
    if not (args.data or args.likelihood or args.obedience == "shapes"):
        raise UserError("nothing to measure", hint="give --data DIR, or --obedience shapes")
    device = launch.resolve(args.device)
    pipeline = load_pipeline(args.model, device, args.text_encoder)
    sampling, settings = choose(args)
    numbers: dict[str, Any] = {"settings": settings, "seed": args.seed, "batch_size": args.batch_size}
    numbers |= {"hashes": pipeline_hashes(pipeline)}
    if args.obedience == "shapes":
        numbers |= shapes_obedience(pipeline, sampling, args)
    if args.likelihood:
        with explained(SAMPLING):
            numbers |= likelihood(pipeline, sampling, args, device)
    elif args.data:
        numbers |= distances(pipeline, sampling, args, device)
    return numbers


def likelihood(pipeline: Any, sampling: Any, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """log p of held-out pictures' latents given their captions, by the probability-flow ODE; and the bound that a model
    of learned variance was trained on."""
    images, exact = held_out(args), args.likelihood_trace == "exact"
    found, bounds = [], []
    for first, pixels in enumerate(chunks(images, images.first(args.likelihood), device)):
        index = range(first * CHUNK, first * CHUNK + len(pixels))
        latents = pipeline.autoencoder.norm.mean_latents(pipeline.autoencoder.encode(to_unit(pixels)))
        denoise = pipeline.denoiser.bind(pipeline.text([caption(images, i) for i in index]))
        probe = Noise.from_seeds([args.seed + i for i in index], device)
        grid, probes = sampling.grid(sampling.steps, denoise.schedule), args.likelihood_probes
        found.append(log_likelihood(denoise, latents, grid, None if exact else probe, probes).cpu())
        if pipeline.denoiser.diffusion.learned_variance:
            bounds.append(bound(denoise, latents, probe).cpu())
        print(f"log-likelihood of {index.stop} pictures", file=sys.stderr)
    nats, dims = torch.cat(found).double(), latents[0].numel()
    return {
        "likelihood_trace": "exact" if exact else f"hutchinson, {args.likelihood_probes} probe(s) a picture",
        "log_likelihood": nats.mean().item(),
        "log_likelihood_error": (nats.std() / len(nats) ** 0.5).item() if len(nats) > 1 else None,
        "bits_per_dim": bits_per_dim(nats.mean(), dims).item(),
        "bound_bits_per_dim": torch.cat(bounds).double().mean().item() if bounds else None,
        "latent_dims": dims,
        "pictures": len(nats),
    }


def distances(pipeline: Any, sampling: Any, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Frechet and kernel distance of `count` generated pictures to the held-out ones, captions evenly from theirs."""
    images, features = held_out(args), load_features(args.features, device)
    train = Images(ShardSet(args.data, "train"))
    judge = load_classifier(args.obedience, device) if args.obedience not in (None, "shapes") else None
    count = args.count or len(images)
    enough(min(count, len(images), len(train)))
    requests = ask(even_captions(images, count), 1, args.seed)
    verdicts: list[bool] = []

    def judged() -> Iterator[Tensor]:
        for pixels, captions in drawn(pipeline, sampling, requests, args.batch_size):
            verdicts.extend(named(judge, pixels, captions) if judge else [])
            yield pixels

    copies = (_reconstruct(pipeline.autoencoder, p) for p in chunks(images, even_indices(images, count), device))
    real, real_rows = gather(features, chunks(images, range(len(images)), device))
    sets = {
        "generated": gather(features, judged()),
        "reconstructed": gather(features, copies),
        "training": gather(features, chunks(train, even_indices(train, count), device)),
    }
    numbers: dict[str, Any] = {f"frechet_{name}": frechet_distance(real, found) for name, (found, _) in sets.items()}
    numbers["frechet_ratio"] = numbers["frechet_generated"] / max(1e-12, numbers["frechet_reconstructed"])
    numbers |= {"features": features.name, "pictures": len(requests), "real_pictures": real.count}
    numbers |= {f"{name}_pictures": sets[name][0].count for name in ("reconstructed", "training")}
    kernel = real_rows[:: max(1, len(images) // KERNEL_SAMPLES)], sets["generated"][1][:KERNEL_SAMPLES]
    numbers |= {"kernel_distance": kernel_distance(*kernel)}
    numbers |= {"kernel_real_pictures": len(kernel[0]), "kernel_pictures": len(kernel[1])}
    if judge:
        numbers |= {"obedience": sum(verdicts) / len(verdicts), "obedience_judge": f"classifier {_short(judge)}"}
        numbers["obedience_95"] = list(wilson(sum(verdicts), len(verdicts)))
    return numbers


def enough(pictures: int) -> None:
    """Raises UserError for fewer pictures than have a covariance."""
    if pictures < 2:
        what = f"a distance between sets of pictures needs at least 2 in each (got {pictures})"
        raise UserError(what, hint="raise --count, or pack more pictures")


def gather(features: Features, batches: Iterable[Tensor]) -> tuple[Moments, Tensor]:
    """Moments and features (N, D) of pictures given batch by batch."""
    moments, rows = Moments(features.dim), []
    for pixels in batches:
        found = features(pixels)
        moments.add(found)
        rows.append(found.cpu())
    return moments, torch.cat(rows)


def held_out(args: argparse.Namespace) -> Images:
    """The val split of --data."""
    if not args.data:
        raise UserError("--data is missing", hint="name the packed pictures the model is measured against")
    return Images(ShardSet(args.data, "val"))


def chunks(images: Images, places: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """uint8 batches of the pictures at `places`."""
    return (batch.data.to(device) for batch in images.chunks(places, CHUNK))


def by_caption(images: Images) -> dict[str, list[int]]:
    """Positions of each distinct first caption."""
    places: dict[str, list[int]] = {}
    for i in range(len(images)):
        places.setdefault(caption(images, i), []).append(i)
    return places


def even_captions(images: Images, count: int) -> list[str]:
    """`count` captions, the distinct ones equally often."""
    names = sorted(by_caption(images))
    return [names[i % len(names)] for i in range(count)]


def even_indices(images: Images, count: int) -> list[int]:
    """`count` pictures, each caption equally often where there are enough of it; in the order in which they are stored,
    so that a shard from elsewhere is fetched once."""
    places = by_caption(images)
    each = -(-count // len(places))
    return sorted([i for name in sorted(places) for i in places[name][:each]][:count])


def check_crop(size: int | None, images: Images) -> None:
    """Raises UserError for a crop that is no part of the pictures."""
    side = min(images[0].data.shape[-2:])
    if size is not None and not 1 <= size <= side:
        what = f"--crop: must lie in 1 to {side}, the pictures' side (got {size})"
        raise UserError(what, hint="leave it out to measure whole pictures")


def crop(pixels: Tensor, size: int | None) -> Tensor:
    """The central size x size, where asked: padding is easy to reconstruct."""
    if not size:
        return pixels
    top, left = (pixels.shape[-2] - size) // 2, (pixels.shape[-1] - size) // 2
    return pixels[..., top : top + size, left : left + size]
