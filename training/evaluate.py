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
from training import launch, pictures
from training import perceptual as lpips
from training.asking import Request, ask, choose
from training.classifier import Classifier, caption, load_classifier
from training.data import Images
from training.errors import DATA, UserError
from training.features import Features, load_features
from training.files import read_json, write_json
from training.metrics import Moments, frechet_distance, kernel_distance, wilson
from training.remote import located
from training.runs import autoencoder_hashes, load_autoencoder, versions
from training.shards import ShardSet
from training.system import load_pipeline, pipeline_hashes

if TYPE_CHECKING:
    import argparse

CHUNK = 100
KERNEL_SAMPLES = 2000  # the kernel distance compares all pairs


def evaluate(args: argparse.Namespace) -> int:
    """Measure a run of either stage, print a table, write JSON. Returns the exit code."""
    launch.keep_memory()
    if args.data:
        args.data = located(args.data, args.cache_dir, args.cache_size)
    since = time.perf_counter()
    values = read_json(find_any(args.model) / "config.json")
    numbers = of_autoencoder(args) if "model" in values else of_denoiser(args)
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
    """The folder of a run's config, whichever its stage."""
    for place in (Path(model) / "final", Path(model)):
        if (place / "config.json").is_file():
            return place
    raise UserError(f"{model}: no such run", hint="give a run folder or its final/", code=DATA)


def of_autoencoder(args: argparse.Namespace) -> dict[str, Any]:
    """Stage one on held-out pictures: PSNR, SSIM, LPIPS where asked, Frechet distance of reconstructions."""
    device = launch.resolve(args.device)
    model = load_autoencoder(args.model, device)
    images, features = held_out(args), load_features(args.features, device)
    network = (
        lpips.load_perceptual(
            args.lpips_net,
            "standard" if args.lpips == "standard" else "random",
            None if args.lpips in ("standard", "random") else args.lpips,
        ).to(device)
        if args.lpips
        else None
    )
    rows: dict[str, list[Tensor]] = {name: [] for name in ("psnr", "ssim", *(["lpips"] if network else []))}
    real, ours = Moments(features.dim), Moments(features.dim)
    for pixels in chunks(images, images.first(args.count), device):
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
        "crop": args.crop or 0,
        "hashes": autoencoder_hashes(model),
    }


@torch.no_grad()
def _reconstruct(model: Any, pixels: Tensor) -> Tensor:
    """Pictures through the posterior's mean, 8-bit."""
    return to_uint8(model(to_unit(pixels), None)[0])


def of_denoiser(args: argparse.Namespace) -> dict[str, Any]:
    """Stage two: generated against held-out pictures, and how far captions are obeyed."""
    device = launch.resolve(args.device)
    pipeline = load_pipeline(args.model, device, args.text_encoder)
    sampling, settings = choose(args)
    numbers: dict[str, Any] = {"settings": settings, "seed": args.seed, "hashes": pipeline_hashes(pipeline)}
    if args.obedience == "shapes":
        numbers |= shapes_obedience(pipeline, sampling, args)
    if args.likelihood:
        numbers |= likelihood(pipeline, sampling, args, device)
    elif args.data:
        numbers |= distances(pipeline, sampling, args, device)
    elif args.obedience != "shapes":
        raise UserError("nothing to measure", hint="give --data DIR, or --obedience shapes")
    return numbers


def likelihood(pipeline: Any, sampling: Any, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """log p of held-out pictures' latents given their captions, by the probability-flow ODE with Hutchinson's trace."""
    images = held_out(args)
    found = []
    for first, pixels in enumerate(chunks(images, images.first(args.likelihood), device)):
        index = range(first * CHUNK, first * CHUNK + len(pixels))
        latents = pipeline.autoencoder.norm.mean_latents(pipeline.autoencoder.encode(to_unit(pixels)))
        denoise = pipeline.denoiser.bind(pipeline.text([caption(images, i) for i in index]))
        probe = Noise.from_seeds([args.seed + i for i in index], device)
        found.append(log_likelihood(denoise, latents, sampling.grid(sampling.steps, denoise.schedule), probe).cpu())
        print(f"log-likelihood of {index.stop} pictures", file=sys.stderr)
    nats, dims = torch.cat(found).double(), latents[0].numel()
    return {
        "log_likelihood": nats.mean().item(),
        "log_likelihood_error": (nats.std() / len(nats) ** 0.5).item() if len(nats) > 1 else None,
        "bits_per_dim": bits_per_dim(nats.mean(), dims).item(),
        "latent_dims": dims,
        "pictures": len(nats),
    }


def distances(pipeline: Any, sampling: Any, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Frechet and kernel distance of `count` generated pictures to the held-out ones, captions evenly from theirs."""
    images, features = held_out(args), load_features(args.features, device)
    train = Images(ShardSet(args.data, "train"))
    judge = load_classifier(args.obedience, device) if args.obedience else None
    requests = ask(even_captions(images, args.count), 1, args.seed)
    verdicts: list[bool] = []

    def judged() -> Iterator[Tensor]:
        for pixels, captions in drawn(pipeline, sampling, requests, args.batch_size):
            verdicts.extend(named(judge, pixels, captions) if judge else [])
            yield pixels

    copies = (_reconstruct(pipeline.autoencoder, p) for p in chunks(images, even_indices(images, args.count), device))
    real, real_rows = gather(features, chunks(images, range(len(images)), device))
    sets = {
        "generated": gather(features, judged()),
        "reconstructed": gather(features, copies),
        "training": gather(features, chunks(train, even_indices(train, args.count), device)),
    }
    numbers: dict[str, Any] = {f"frechet_{name}": frechet_distance(real, found) for name, (found, _) in sets.items()}
    numbers |= {
        "frechet_ratio": numbers["frechet_generated"] / max(1e-12, numbers["frechet_reconstructed"]),
        "kernel_distance": kernel_distance(
            real_rows[:: max(1, len(images) // KERNEL_SAMPLES)], sets["generated"][1][:KERNEL_SAMPLES]
        ),
        "features": features.name,
        "pictures": len(requests),
        "real_pictures": real.count,
    }
    if judge:
        low, high = wilson(sum(verdicts), len(verdicts))
        numbers |= {"obedience": sum(verdicts) / len(verdicts), "obedience_95": [low, high]}
    return numbers


def gather(features: Features, batches: Iterable[Tensor]) -> tuple[Moments, Tensor]:
    """Moments and features (N, D) of pictures given batch by batch."""
    moments, rows = Moments(features.dim), []
    for pixels in batches:
        found = features(pixels)
        moments.add(found)
        rows.append(found.cpu())
    return moments, torch.cat(rows)


def drawn(
    pipeline: Any, sampling: Any, requests: list[Request], batch: int
) -> Iterator[tuple[Tensor, list[str]]]:
    """The pictures asked for and their captions, batch by batch."""
    for first in range(0, len(requests), batch):
        part = requests[first : first + batch]
        captions, seeds = [r.prompt for r in part], [r.seed for r in part]
        if first % (10 * batch) == 0:
            print(f"generating {first + len(part)} of {len(requests)}", file=sys.stderr)
        yield next(pipeline.pixels(captions, seeds, sampling=sampling, batch_size=len(part))), captions


def shapes_obedience(pipeline: Any, sampling: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Share of held-out captions obeyed, for one, two and three objects, by the rule-based checker; a grid."""
    from training.shapes import held_out_prompts
    from training.shapes_checker import check

    numbers: dict[str, Any] = {"prompts": args.count}
    shown: list[Any] = []
    captions: list[str] = []
    for objects in (1, 2, 3):
        asked = ask(held_out_prompts(args.count, objects, seed=args.seed), 1, args.seed)
        verdicts: list[dict[str, bool]] = []
        for pixels, prompts in drawn(pipeline, sampling, asked, args.batch_size):
            images = pixels.permute(0, 2, 3, 1).cpu().numpy()
            found = [check(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
            if not verdicts:
                shown += pictures.to_pil(pixels[:16])
                captions += [f"{'yes' if v['obeyed'] else 'NO'}: {p}" for v, p in zip(found, prompts, strict=True)][:16]
            verdicts += found
        obeyed = sum(v["obeyed"] for v in verdicts)
        numbers[f"obedience_{objects}"] = obeyed / len(verdicts)
        numbers[f"obedience_{objects}_95"] = list(wilson(obeyed, len(verdicts)))
        for key in sorted(set().union(*verdicts) - {"obeyed"}):
            said = [v[key] for v in verdicts if key in v]
            numbers[f"obedience_{objects}_{key}"] = sum(said) / len(said)
    if args.grid:
        pictures.grid(shown, 8, captions=captions).save(args.grid)
        numbers["grid"] = Path(args.grid).name
    return numbers


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


def crop(pixels: Tensor, size: int | None) -> Tensor:
    """The central size x size, where asked: padding is easy to reconstruct."""
    if not size:
        return pixels
    top, left = (pixels.shape[-2] - size) // 2, (pixels.shape[-1] - size) // 2
    return pixels[..., top : top + size, left : left + size]


def named(judge: Classifier, pixels: Tensor, captions: list[str]) -> list[bool]:
    """Whether the classifier gives each picture the class its caption states."""
    with torch.no_grad():
        answers = judge(pixels).argmax(1).tolist()
    return [judge.classes[a] == c for a, c in zip(answers, captions, strict=True)]
