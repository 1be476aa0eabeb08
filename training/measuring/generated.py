"""Generated pictures against held-out ones, beside what reconstructions and training pictures get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.drawing.prompts import tell_reading
from training.drawing.requests import ask
from training.measuring import measures
from training.measuring.clip_score import ClipScore, load_clip_score, scored
from training.measuring.distances import share
from training.measuring.features import load_features
from training.measuring.held_out import (
    CHUNK,
    check_count,
    check_held_out,
    chunks,
    even_captions,
    even_indices,
    gather,
    held_out,
    trained_on,
    warn_of_few,
)
from training.measuring.networks.base import Features
from training.measuring.obedience import draw_batches, obeyed_by_classifier
from training.messages import tell
from training.models.judge import Classifier, caption, load_classifier
from training.models.reconstructions import reconstructed
from training.tensors import content_hash

if TYPE_CHECKING:
    import argparse

    from training.data.images import Images
    from training.ledger import Ledger


@dataclass
class Witness:
    """What is asked of each drawn picture and its caption, while the pictures pass by."""

    judge: Classifier | None
    clip: ClipScore | None
    verdicts: list[bool] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def see(self, pixels: Tensor, captions: list[str]) -> Tensor:
        """The pictures, as they came."""
        if self.judge:
            self.verdicts += obeyed_by_classifier(self.judge, pixels, captions)
        if self.clip:
            self.scores.append(self.clip(pixels, captions))
        return pixels

    def numbers(self, images: Images, places: Sequence[int], device: torch.device, ledger: Ledger) -> dict[str, Any]:
        """Obedience, and the CLIP score beside that of the held-out pictures at `places` and their own captions."""
        numbers: dict[str, Any] = {}
        if self.judge:
            judge = content_hash(self.judge.state_dict())[:12]
            numbers |= share("obedience", self.verdicts) | {"obedience_judge": f"classifier {judge}"}
        if self.clip:
            batches = enumerate(chunks(images, places, device))
            own = [self.clip(pixels, _captions(images, places[n * CHUNK :][: len(pixels)])) for n, pixels in batches]
            numbers |= scored("clip_score", self.scores) | scored("clip_score_real", own) | {"clip": self.clip.about()}
            self.clip.tell(ledger)
        return numbers


def distances(
    pipeline: Any, sampling: Any, args: argparse.Namespace, device: torch.device, ledger: Ledger
) -> dict[str, Any]:
    """The `MEASURES` between `count` generated pictures and the held-out ones, captions evenly from theirs."""
    images, features = held_out(args), load_features(args.features, device)
    train = trained_on(args.data)
    check_held_out(len(images), len(train or ()))
    judge = load_classifier(args.obedience, device) if args.obedience not in (None, "shapes") else None
    witness = Witness(judge, load_clip_score(args.clip, device) if args.clip else None)
    count = args.count or len(images)
    smallest = min(count, len(images), len(train) if train else count)
    check_count(smallest)
    few = warn_of_few(features.dim, smallest)
    requests, places = ask(even_captions(images, count), 1, args.seed), even_indices(images, count)
    tell_reading((request.prompt for request in requests), ledger, pipeline.text, aloud=False)
    drawn = draw_batches(pipeline, sampling, requests, args.batch_size)
    copies = (reconstructed(pipeline.autoencoder, p) for p in chunks(images, places, device, "reconstructing"))
    real = gather(features, chunks(images, range(len(images)), device))
    sets = {
        "generated": gather(features, (witness.see(*batch) for batch in drawn)),
        "reconstructed": gather(features, copies),
    }
    if train:
        trained = chunks(train, even_indices(train, count), device, "measuring training pictures")
        sets["training"] = gather(features, trained)
    numbers = compared(features, real, sets, args.seed, len(places) == len(images))
    numbers |= {"features": features.name, "pictures": len(requests), "real_pictures": len(real)}
    numbers |= {f"{name}_pictures": len(rows) for name, rows in sets.items() if name != "generated"} | few
    numbers |= {"kernel_real_pictures": min(len(real), measures.PAIRS), "kernel_pictures": min(count, measures.PAIRS)}
    return numbers | {"network": features.about()} | witness.numbers(images, places, device, ledger)


def compared(
    features: Features, real: Tensor, sets: dict[str, Tensor], seed: int, whole: bool
) -> dict[str, Any]:
    """Every measure of every set against `real`. `whole`: all of the real pictures were reconstructed, in order."""
    numbers: dict[str, Any] = {}
    for name, rows in sets.items():
        tell(f"comparing {len(rows)} {name} pictures with {len(real)} held-out ones")
        pair = measures.Pair(real, rows, seed, paired=whole and name == "reconstructed")
        numbers |= measures.compare(features, pair, partial(named, name))
    numbers["frechet_ratio"] = numbers["frechet_generated"] / max(1e-12, numbers["frechet_reconstructed"])
    return numbers


def named(group: str, measure: str) -> str:
    """The key of a number: measures of generated pictures bear their own names alone, but for Frechet's."""
    return measure if group == "generated" and measure != "frechet" else f"{measure}_{group}"


def _captions(images: Images, places: Sequence[int]) -> list[str]:
    return [caption(images, place) for place in places]
