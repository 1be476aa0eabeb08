"""How far drawings follow the hints they are given: held-out pictures drawn again from their captions and hints."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm.adapters.controlled import Controlled
from training.drawing import adapters
from training.errors import DATA, UserError
from training.measuring.distances import share
from training.measuring.held_out import even_indices, held_out
from training.measuring.obedience import sampling_errors
from training.models.folders import name_of
from training.models.hints import HintRead, hint_read
from training.models.judge import caption
from training.models.reconstructions import reconstructed
from training.pictures.hints import EXTRA, FIELD, HALF, Bytes, Hint, hint_of, loaded
from training.progress import Progress

if TYPE_CHECKING:
    import argparse

    from ldm.pipeline import Pipeline, Sampling
    from training.data.images import Images
    from training.ledger import Ledger

UNREAD = "hints, which neither the model nor an adapter reads"
UNMADE = "drawing of which no such hint can be made"
OTHERS = "hints, of another kind or range than a run learned from"


def control(pipeline: Pipeline, sampling: Sampling, args: argparse.Namespace, ledger: Ledger) -> dict[str, Any]:
    """Intersection over union of the hint of each drawing with the hint that it was given, and of the autoencoder's
    reconstruction, beyond which no drawing can be asked to go; of the embedded shapes, how near their places are."""
    images = held_out(args, "--hints")
    told = images.shards.summary.get("hint")
    if not told:
        hint = "pack the pictures with make_shards pack --hint KIND"
        raise UserError(f"there are no hints beside the pictures of {args.data}", hint=hint, code=DATA)
    kind, places = hint_of(told["kind"]), even_indices(images, args.count)
    reads = pipeline.image.kind == "hint" or isinstance(pipeline.denoiser.backbone, Controlled)
    ledger.add("ignored", UNREAD, count=0 if reads else len(places))
    for run in (args.model, *(one.run for one in adapters.chosen(args))):
        ledger.add("guessed", OTHERS, name_of(run), len(places) * others(hint_read(run), told))
    drawn, ceiling, truths = list[Bytes](), list[float](), list[Bytes]()
    overlaps, captions = list[float](), [caption(images, place) for place in places]
    with Progress("drawing", len(places)) as progress:
        for first in range(0, len(places), args.batch_size):
            part = slice(first, first + args.batch_size)
            pixels = torch.stack([images[place].data[0] for place in places[part]]).to(pipeline.device)
            hints = [hint_beside(images, place, told["channels"]) for place in places[part]]
            shown = torch.from_numpy(np.stack(hints)).to(pipeline.device).float() / 255
            seeds = list(range(args.seed + first, args.seed + first + len(hints)))
            with sampling_errors():
                made = next(pipeline.pixels(captions[part], seeds, extras={EXTRA: shown}, sampling=sampling,
                                            batch_size=len(hints)))
            again = reconstructed(pipeline.autoencoder, pixels)
            overlaps += [followed(kind, one, hint, ledger) for one, hint in zip(arrays(made), hints, strict=True)]
            ceiling += [followed(kind, one, hint, ledger) for one, hint in zip(arrays(again), hints, strict=True)]
            drawn, truths = [*drawn, *arrays(made)], [*truths, *arrays(pixels)]
            progress.add(len(hints))
    numbers: dict[str, Any] = {"pictures": len(places), "hint": kind.kind, "hint_iou": float(np.mean(overlaps))}
    numbers["hint_iou_of_reconstructions"] = float(np.mean(ceiling))
    return numbers | (placed(drawn, truths, captions) if args.obedience == "shapes" else {})


def others(reads: HintRead | None, told: Mapping[str, Any]) -> bool:
    """Whether what a run reads is known to be another hint than what the summary of pictures has `told`."""
    if reads is None or reads.kind is None:
        return False
    return (reads.kind, [*(reads.range or ())]) != (told["kind"], told.get("range", []))


def hint_beside(images: Images, place: int, channels: int) -> Bytes:
    """The stored hint (C, H, W) of a picture."""
    size = images[place].data.shape[-2:]
    return loaded(images.shards.read(place, (FIELD,)).get(FIELD, b""), channels, (size[0], size[1]))


def arrays(pixels: Tensor) -> list[Bytes]:
    """uint8 (B, C, H, W) -> (H, W, C) each."""
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


def followed(kind: Hint, picture: Bytes, hint: Bytes, ledger: Ledger) -> float:
    """Intersection over union of a picture's own hint with a hint (C, H, W); 0 where it has none, and noted."""
    try:
        own = kind.made(picture, None).values[..., 0] >= HALF
    except UserError:
        ledger.add("guessed", UNMADE, kind.kind)
        return 0.0
    given = hint[0] >= HALF
    union = int((own | given).sum())
    return int((own & given).sum()) / union if union else 1.0


def placed(drawn: list[Bytes], truths: list[Bytes], captions: list[str]) -> dict[str, Any]:
    """Of drawings of the embedded shapes: the share that obeys its caption; and of those, against the true pictures,
    the root of the mean squared error of a centre, along an axis, and of an extent, in thirty-seconds of the side."""
    from training.shapes.checker import check, read
    from training.shapes.scenes import UNIT

    obeyed = [check(picture, text)["obeyed"] for picture, text in zip(drawn, captions, strict=True)]
    offsets, extents = list[float](), list[float]()
    for picture, truth, well in zip(drawn, truths, obeyed, strict=True):
        ours, theirs = read(picture), read(truth)
        if not well or len(ours) != len(theirs):
            continue
        pairs = [list(zip(order, theirs, strict=True)) for order in permutations(ours)]
        away = [[(a.position[axis] - b.position[axis]) * UNIT for a, b in pair for axis in (0, 1)] for pair in pairs]
        nearest = min(range(len(pairs)), key=lambda i: sum(error**2 for error in away[i]))
        offsets += away[nearest]
        extents += [(a.extent - b.extent) * UNIT for a, b in pairs[nearest]]
    errors = {"centre_error": offsets, "extent_error": extents}
    rms = {name: float(np.sqrt(np.mean(np.square(values)))) if values else None for name, values in errors.items()}
    return share("obedience", obeyed) | rms
