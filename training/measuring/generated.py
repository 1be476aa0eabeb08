"""Generated pictures against held-out ones, beside what reconstructions and training pictures get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.drawing.prompts import tell_reading
from training.drawing.requests import Request, ask
from training.measuring import measures
from training.measuring.clip_score import ClipScore, load_clip_score, scored
from training.measuring.distances import share
from training.measuring.features import load_features
from training.measuring.held_out import (
    check_count,
    check_held_out,
    chunks,
    even_captions,
    even_indices,
    gather,
    held_out,
    parts,
    sizes_of_captions,
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

    from autoencoder.base import Autoencoder
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
            batches = parts(images, places, device, "scoring held-out pictures")
            own = [self.clip(pixels, _captions(images, places[part])) for part, pixels in batches]
            numbers |= scored("clip_score", self.scores) | scored("clip_score_real", own) | {"clip": self.clip.about()}
            self.clip.tell(ledger)
        return numbers


@dataclass(frozen=True)
class Truth:
    """What drawn pictures are held against, in a feature space: held-out pictures, and others that no model drew."""

    images: Images
    train: Images | None
    features: Features
    device: torch.device
    count: int
    real: Tensor  # features of all held-out pictures
    few: dict[str, list[str]]  # what to say of so few pictures

    @cached_property
    def captions(self) -> list[str]:
        """What is drawn, evenly from the captions of the held-out pictures."""
        return even_captions(self.images, self.count)

    @cached_property
    def places(self) -> list[int]:
        """The held-out pictures that are reconstructed."""
        return even_indices(self.images, self.count)

    def beside(self, autoencoder: Autoencoder) -> dict[str, Tensor]:
        """The features of as many pictures that cost no drawing: reconstructions, and training pictures."""
        features, images, places, device = self.features, self.images, self.places, self.device
        copies = (reconstructed(autoencoder, p) for p in chunks(images, places, device, "reconstructing"))
        sets = {"reconstructed": gather(features, copies)}
        if self.train:
            trained = chunks(self.train, even_indices(self.train, self.count), device, "measuring training pictures")
            sets["training"] = gather(features, trained)
        return sets

    def compared(self, sets: Mapping[str, Tensor], seed: int) -> dict[str, Any]:
        """Every measure of every set against the held-out pictures; reconstructions of all of them are in order."""
        numbers: dict[str, Any] = {}
        whole = len(self.places) == len(self.images)
        for name, rows in sets.items():
            tell(f"comparing {len(rows)} {name} pictures with {len(self.real)} held-out ones")
            pair = measures.Pair(self.real, rows, seed, paired=whole and name == "reconstructed")
            numbers |= measures.compare(self.features, pair, partial(named, name))
        return numbers

    def counts(self, sets: Mapping[str, Tensor]) -> dict[str, Any]:
        """How many pictures of each kind the numbers rest on, and the network that they were seen in."""
        numbers: dict[str, Any] = {"features": self.features.name, "pictures": self.count}
        numbers |= {"real_pictures": len(self.real), **{f"{name}_pictures": len(rows) for name, rows in sets.items()}}
        numbers |= self.few | {"kernel_real_pictures": min(len(self.real), measures.PAIRS)}
        return numbers | {"kernel_pictures": min(self.count, measures.PAIRS), "network": self.features.about()}


def held_against(args: argparse.Namespace, device: torch.device) -> Truth:
    """The truth of `--data`, `--count` and `--features`. Raises UserError for fewer pictures than are compared."""
    images, features = held_out(args), load_features(args.features, device)
    train = trained_on(args.data)
    check_held_out(len(images), len(train or ()))
    count = args.count or len(images)
    smallest = min(count, len(images), len(train) if train else count)
    check_count(smallest)
    few = warn_of_few(features.dim, smallest)
    real = gather(features, chunks(images, range(len(images)), device))
    return Truth(images, train, features, device, count, real, few)


def witness_of(obedience: str | None, clip: str | None, device: torch.device) -> Witness:
    """The judges of `--obedience CLASSIFIER` and `--clip`."""
    judge = load_classifier(obedience, device) if obedience not in (None, "shapes") else None
    return Witness(judge, load_clip_score(clip, device) if clip else None)


def distances(
    pipeline: Any, sampling: Any, args: argparse.Namespace, device: torch.device, ledger: Ledger
) -> dict[str, Any]:
    """The `MEASURES` between `count` generated pictures and the held-out ones, captions evenly from theirs."""
    witness, truth = witness_of(args.obedience, args.clip, device), held_against(args, device)
    requests = ask(truth.captions, 1, args.seed)
    tell_reading((request.prompt for request in requests), ledger, pipeline.text, aloud=False)
    sizes = sizes_of_captions(truth.images, truth.captions)
    drawn = draw_in_sizes(pipeline, sampling, requests, sizes, args.batch_size)
    generated = gather(truth.features, (witness.see(*batch) for batch in drawn))
    beside = truth.beside(pipeline.autoencoder)
    numbers = rated(truth.compared({"generated": generated, **beside}, args.seed)) | truth.counts(beside)
    numbers |= {"drawn_sizes": "those of the held-out pictures, caption by caption"} if truth.images.sizes else {}
    return numbers | witness.numbers(truth.images, truth.places, device, ledger)


def draw_in_sizes(
    pipeline: Any, sampling: Any, requests: list[Request], sizes: Sequence[tuple[int, int] | None], batch: int
) -> Iterator[tuple[Tensor, list[str]]]:
    """`draw_batches` of the requests, each in its size, None for the pipeline's own."""
    for size in dict.fromkeys(sizes):
        own = [request for request, wanted in zip(requests, sizes, strict=True) if wanted == size]
        yield from draw_batches(replace(pipeline, size=size) if size else pipeline, sampling, own, batch)


def rated(numbers: dict[str, Any]) -> dict[str, Any]:
    """Beside the Frechet distances, how many times that of reconstructions the generated pictures' is."""
    ratio = numbers["frechet_generated"] / max(1e-12, numbers["frechet_reconstructed"])
    return numbers | {"frechet_ratio": ratio}


def named(group: str, measure: str) -> str:
    """The key of a number: measures of generated pictures bear their own names alone, but for Frechet's."""
    return measure if group == "generated" and measure != "frechet" else f"{measure}_{group}"


def _captions(images: Images, places: Sequence[int]) -> list[str]:
    return [caption(images, place) for place in places]
