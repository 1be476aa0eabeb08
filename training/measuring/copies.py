"""Whether a model repeats its training pictures: distances of drawn pictures, judged by those of held-out ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.data.images import Images
from training.drawing.prompts import tell_reading
from training.drawing.requests import Request
from training.errors import DATA, UserError
from training.measuring.distances import share
from training.measuring.features import load_features
from training.measuring.held_out import check_count, chunks, held_out, of_one_size
from training.measuring.nearest import Nearest, Space, nearest, pixel_space
from training.measuring.obedience import draw_batches
from training.messages import note, warn
from training.models.folders import find
from training.models.judge import caption
from training.models.reconstructions import reconstructed
from training.pictures import grids
from training.runs.folder import record
from training.runs.ingredients import difference
from training.shards.index import pictures_facts
from training.shards.reading import ShardSet, holding_out

if TYPE_CHECKING:
    import argparse

    from PIL import Image

    from ldm.pipeline import Pipeline, Sampling
    from training.ledger import Ledger

NEARER = 0.05  # share of held-out pictures below whose distances a drawn picture counts as a copy
LEAST = 20  # held-out pictures that can calibrate anything
HELD_OUT = 5000  # held-out pictures measured at most, evenly over the split
CONTROL = 200  # training pictures that are sent through the autoencoder and searched for
SEEN = 0.9  # share of them that must be found for a low score to say anything
SHOWN = 16  # pairs of the sheet
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LATER = "see whether it grew with the steps: the same command with --model RUN/checkpoints/step-N of an earlier one"
BLIND = "held-out pictures lie as near to training pictures as copies do, or these features see too little"
ADVICE = (
    "train on more pictures, or for fewer steps (the best checkpoint is kept); mirrored pictures help: "
    "encode_latents --flip with --train.flip true"
)


def copies(
    pipeline: Pipeline, sampling: Sampling, args: argparse.Namespace, device: torch.device, ledger: Ledger
) -> dict[str, Any]:
    """Draw --count pictures, half of them from training captions, half from held-out ones, each of a seed of its own,
    and search --train-count training pictures (0: all) for the nearest of each, mirrored ones too.

    The threshold is the distance below which `NEARER` of one half of the held-out pictures lie, seen through the
    autoencoder as drawn pictures are; the other half tells what chance gives. Training pictures through the autoencoder
    tell how many of perfect copies would be found. Raises UserError as `splits`.
    """
    held, train = splits(args)
    numbers: dict[str, Any] = {"trained_on_data": trained_on_data(args)}
    places, known = train.evenly(args.train_count), held.evenly(HELD_OUT)
    control = [places[i * len(places) // CONTROL] for i in range(CONTROL)] if len(places) > CONTROL else places
    check_count(args.count or len(held))
    requests = half_and_half(train, held, args.count or len(held), args.seed)
    tell_reading((request.prompt for request in requests), ledger, pipeline.text, aloud=False)
    drawn: list[Tensor] = []

    def queries() -> Iterator[Tensor]:
        for pixels, _ in draw_batches(pipeline, sampling, requests, args.batch_size):
            drawn.append(pixels.cpu())
            yield pixels
        for images, some, what in ((held, known, "held-out"), (train, control, "training")):
            shown = chunks(images, some, device, f"reconstructing {what} pictures")
            yield from (reconstructed(pipeline.autoencoder, pixels) for pixels in shown)

    features = load_features(args.features, device)
    spaces: dict[str, Space] = {"features": features, "pixels": pixel_space(*train[0].data.shape[-2:])}
    found = nearest(spaces, queries(), train, places, device)
    numbers |= {"features": features.name, "pictures": len(requests), "training_pictures": len(places)}
    numbers["network"] = features.about()
    numbers |= {"training_split": len(train), "held_out_pictures": len(known), "reconstructed_pictures": len(control)}
    numbers |= of_both(found, len(requests), len(known))
    near, pixels = (one.part(0, len(requests)) for one in found.values())
    pairs = paired(requests, train, near, pixels, numbers["copy_distance"])
    if args.grid:
        grids.write(sheet(pairs, torch.cat(drawn), train), Path(args.grid))
        numbers["grid"] = Path(args.grid).name
    return numbers | {"pairs": pairs}


def splits(args: argparse.Namespace) -> tuple[Images, Images]:
    """Held-out and training pictures of --data. Raises UserError for too few of the first, or none of the second."""
    held, train = held_out(args, "--copies"), of_one_size(Images(ShardSet(args.data, "train")), "--copies")
    if len(held) < LEAST:
        what = f"copies are told by {LEAST} held-out pictures or more, the data hold out {len(held)}"
        raise UserError(what, hint=f"hold more of them out: {holding_out(LEAST, len(held) + len(train))}", code=DATA)
    if 0 < args.train_count < len(train):
        some = f"{args.train_count:,} of {len(train):,} training pictures"
        warn(f"{some} are searched: copies of the others are not found")
    if len(held) > HELD_OUT:
        note(f"{HELD_OUT:,} of {len(held):,} held-out pictures calibrate the score")
    return held, train


def of_both(found: Mapping[str, Nearest], drawn: int, known: int) -> dict[str, Any]:
    """The numbers of both spaces, where drawn pictures come first, then held-out ones, then reconstructions; and the
    verdict."""
    numbers: dict[str, Any] = {}
    for near, suffix in zip(found.values(), ("", "_pixels"), strict=True):
        ends = (0, drawn, drawn + known, len(near.place))
        numbers |= {f"{key}{suffix}": value for key, value in judged(*(near.part(*e) for e in pairwise(ends))).items()}
        numbers[f"nearest_distinct{suffix}"] = len(set(near.place[:drawn].tolist()))
    return numbers | {"verdict": verdict(numbers)}


def trained_on_data(args: argparse.Namespace) -> bool | None:
    """Whether the run was trained on the pictures of --data, said aloud where it was not, or does not say (None)."""
    home = find(args.model, "denoiser").home
    records = (record(folder) for folder in (home, home.parent))
    told: dict[str, Any] = next((found.get("data", {}) for found in records if found), {})
    now = pictures_facts(args.data)
    if "pictures_sha256" not in told or not now:
        note(f"{args.model} does not say which pictures it was trained on: those of --data are taken for them")
        return None
    if change := difference(told, now):
        warn(f"{args.model} was trained on other pictures ({change.before}) than those of --data ({change.now}): "
             "what it repeats of its own is not found here")  # fmt: skip
    return not change


def half_and_half(train: Images, held: Images, count: int, seed: int) -> list[Request]:
    """`count` pictures to draw with seeds seed, seed + 1 ...: of training captions, then of held-out ones, each evenly
    over its split, as often as pictures have them."""
    ours = (count + 1) // 2
    captions = [*_captions(train, ours), *_captions(held, count - ours)]
    return [Request(number, text, seed + number) for number, text in enumerate(captions)]


def _captions(images: Images, count: int) -> list[str]:
    texts = [caption(images, place) for place in images.evenly(count)] if count else []
    return [texts[i % len(texts)] for i in range(count)]


def judged(drawn: Nearest, known: Nearest, control: Nearest) -> dict[str, Any]:
    """What distances say of drawn, held-out and reconstructed training pictures: copy scores, C_T, quantiles."""
    below, chance = threshold(known.distance[::2])
    ours = (len(drawn.distance) + 1) // 2

    def score(name: str, distance: Tensor) -> dict[str, Any]:
        return share(name, (distance < below).tolist())

    return {
        **score("copy_score", drawn.distance),
        "copy_chance": chance,
        **score("copy_score_held_out", known.distance[1::2]),
        **score("copy_score_training_captions", drawn.distance[:ours]),
        **score("copy_score_held_out_captions", drawn.distance[ours:]),
        **score("copy_score_reconstructed", control.distance),
        "copy_distance": below,
        "c_t": mann_whitney(drawn.distance, known.distance),
        "distances": {
            name: {f"{q:g}": near.distance.double().quantile(q).item() for q in QUANTILES}
            for name, near in (("generated", drawn), ("held_out", known), ("reconstructed", control))
        },
    }


def threshold(distance: Tensor) -> tuple[float, float]:
    """The k-th smallest of n distances, k = max(1, floor(`NEARER` (n + 1))), and k / (n + 1), the probability that a
    further one of the same law lies below it."""
    count = len(distance)
    k = max(1, int(NEARER * (count + 1)))
    return distance.sort().values[k - 1].item(), k / (count + 1)


def mann_whitney(ours: Tensor, theirs: Tensor) -> float:
    """z of U = #{ours > theirs} + #{equal} / 2 over all pairs, its variance corrected for ties; 0 where all are equal.

    Of distances to training pictures, drawn against held-out, it is C_T over one cell (Meehan, Chaudhuri & Dasgupta
    2020, arXiv 2004.05675): far below 0 copies, far above 0 strays from the data. It grows as the root of the counts.
    """
    n, m = len(ours), len(theirs)
    _, which, times = torch.unique(torch.cat([ours, theirs]), return_inverse=True, return_counts=True)
    times = times.double()
    ranks = (times.cumsum(0) - (times - 1) / 2)[which]
    u = ranks[:n].sum() - n * (n + 1) / 2
    ties = (times**3 - times).sum() / ((n + m) * (n + m - 1))
    variance = n * m / 12 * (n + m + 1 - ties)
    return float((u - n * m / 2) / variance.sqrt()) if variance > 0 else 0.0


def verdict(numbers: dict[str, Any]) -> str:
    """The numbers in a sentence, and what to do."""
    low, high = numbers["copy_score_95"]
    chance, z = numbers["copy_chance"], numbers["c_t"]
    by_caption = [numbers[f"copy_score_{kind}_captions"] for kind in ("training", "held_out")]
    said = (
        f"{numbers['copy_score']:.1%} of the pictures ({low:.1%} to {high:.1%}) lie nearer to a training picture than "
        f"{1 - chance:.1%} of held-out pictures do ({chance:.1%} would be chance); of those of training captions "
        f"{by_caption[0]:.1%}, of held-out captions {by_caption[1]:.1%}; C_T {z:.1f}"
    )
    seen = numbers["copy_score_reconstructed"]
    through = f"of training pictures that went through the autoencoder only {seen:.0%} do"
    if low > chance and seen < SEEN:
        return f"{said}: copies, or pictures so blurred that they lie near many, for {through}. {LATER}"
    if low > chance:
        return f"{said}: the model repeats training pictures. To do: {ADVICE}; {LATER}"
    if z < -3:
        return f"{said}: no single picture stands out, but as a whole they lie nearer than held-out ones. {LATER}"
    if seen < SEEN:
        return f"{said}: that says little, for {through}: {BLIND}"
    return f"{said}: no sign of copies"


def paired(
    requests: Sequence[Request], train: Images, near: Nearest, pixels: Nearest, below: float
) -> list[dict[str, Any]]:
    """Each drawn picture with its nearest training picture, the most suspicious first: by distance / threshold."""
    rows = [
        {
            "picture": request.number,
            "caption": request.prompt,
            "seed": request.seed,
            "nearest": train.shards.key(place),
            "place": place,
            "nearest_caption": caption(train, place),
            "mirrored": mirrored,
            "distance": distance,
            "ratio": distance / below if below else None,
            "nearest_pixels": train.shards.key(other),
            "distance_pixels": rms,
        }
        for request, distance, place, mirrored, rms, other in zip(
            requests, *(values.tolist() for values in (*near, *pixels[:2])), strict=True
        )
    ]
    return sorted(rows, key=lambda row: row["distance"])


def sheet(pairs: Sequence[dict[str, Any]], drawn: Tensor, train: Images) -> Image.Image:
    """The most suspicious pairs: a drawn picture beside its nearest training picture, with both captions."""
    images, captions = [], []
    for row in pairs[:SHOWN]:
        twin = train[row["place"]].data
        images += [*grids.to_pil(drawn[[row["picture"]]]), *grids.to_pil(twin.flip(-1) if row["mirrored"] else twin)]
        mirrored = ", mirrored" if row["mirrored"] else ""
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}: "
        captions += [f"{ratio}{row['caption']}", f"training{mirrored}: {row['nearest_caption']}"]
    return grids.grid(images, 8, captions=captions)
