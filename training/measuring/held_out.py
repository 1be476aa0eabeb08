"""What a model is measured on: held-out samples in chunks, captions drawn evenly, pictures cropped alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.data.images import Images
from training.errors import DATA, UserError
from training.measuring.networks.base import Features
from training.messages import note, warn
from training.models.judge import caption
from training.shards.index import read_index
from training.shards.reading import COMPARED, ShardSet, held_out_shards, holding_out

if TYPE_CHECKING:
    import argparse


CHUNK = 100
SETTLED = 100  # pictures from which on a measure of sets that is not biased is told without a warning
CHOSEN = (
    "every n-th for an autoencoder, a likelihood or copies; else one of each caption, then a second, captions in the "
    "order of their hashes"
)


def check_held_out(held: int, train: int) -> None:
    """Raises UserError where fewer pictures are held out than are compared at all."""
    check_count(held, f"hold more of them out: {holding_out(COMPARED, held + train)}")


def check_count(pictures: int, hint: str = "raise --count, or pack more pictures") -> None:
    """Raises UserError for fewer pictures than are compared at all."""
    if pictures < COMPARED:
        least = f"at least {COMPARED} in each, better {SETTLED}"
        raise UserError(f"a distance between sets of pictures needs {least} (got {pictures})", hint=hint)


def few_pictures(dim: int, fewest: int) -> list[str]:
    """What to say of measures in `dim` features of sets of which the smallest has `fewest` pictures: a line for each
    kind of number that is not to be relied on, with the count that mends it."""
    said = []
    if fewest <= dim:
        what = f"Frechet distances rest on {fewest} pictures in {dim} feature dimensions: up to {dim} the covariance is"
        mend = f"--count {dim + 1} and more, if there are as many; until then compare it at equal counts alone"
        said.append(f"{what} singular, and the distance larger than that of many: {mend}")
    if fewest < SETTLED:
        what = f"{fewest} pictures say little: a distance of fewer than {SETTLED} varies by as much as it is, and so do"
        said.append(f"{what} precision, recall, density and coverage: --count {SETTLED} and more")
    return said


def warn_of_few(dim: int, fewest: int) -> dict[str, list[str]]:
    """`few_pictures`, said aloud, and as numbers are stored."""
    said = few_pictures(dim, fewest)
    for sentence in said:
        warn(sentence)
    return {"warnings": said} if said else {}


def gather(features: Features, batches: Iterable[Tensor]) -> Tensor:
    """Features (N, D) of pictures given batch by batch, on the CPU."""
    return torch.cat([features(pixels).cpu() for pixels in batches])


def held_out(args: argparse.Namespace, alike_for: str = "") -> Images:
    """The val split of --data, else its test split, as in training. Raises UserError where what is measured
    (`alike_for`) takes pictures of one size alone, and these are in several buckets."""
    if not args.data:
        raise UserError("--data is missing", hint="name the packed pictures the model is measured against")
    images = Images(held_out_shards(args.data, at_least="test"))
    return of_one_size(images, alike_for) if alike_for else images


def of_one_size(images: Images, what: str) -> Images:
    """The pictures. Raises UserError where they are of several sizes, and `what` takes those of one alone."""
    if len(images.sizes) > 1:
        found = f"{what} takes pictures of one size, and those of {images.shards.directory} are in {len(images.sizes)}"
        raise UserError(f"{found} buckets", hint="pack them for it without --buckets, and give that folder", code=DATA)
    return images


def trained_on(data: Any) -> Images | None:
    """The train split; None, said aloud, where there is none."""
    if all(info.split != "train" for info in read_index(data)[1]):
        note("the data has no train split: distances of training pictures are left out")
        return None
    return Images(ShardSet(data, "train"))


def chunks(
    images: Images, places: Sequence[int], device: torch.device, doing: str = "measuring held-out pictures"
) -> Iterator[Tensor]:
    """uint8 batches of the pictures at `places`; what is done with them stands in the line that tells how far it is."""
    return (batch.data.to(device) for batch in images.chunks(places, CHUNK, doing))


def parts(
    images: Images, places: Sequence[int], device: torch.device, doing: str
) -> Iterator[tuple[slice, Tensor]]:
    """`chunks`, and which of the places each is of."""
    first = 0
    for pixels in chunks(images, places, device, doing):
        yield slice(first, first + len(pixels)), pixels
        first += len(pixels)


def by_caption(images: Images) -> dict[str, list[int]]:
    """Positions of each distinct first caption."""
    places: dict[str, list[int]] = {}
    for i in range(len(images)):
        places.setdefault(caption(images, i), []).append(i)
    return places


def even_captions(images: Images, count: int) -> list[str]:
    """`count` captions, the distinct ones in turn, in `mixed` order."""
    names = mixed(by_caption(images))
    return [names[i % len(names)] for i in range(count)]


def sizes_of_captions(images: Images, captions: Sequence[str]) -> list[tuple[int, int] | None]:
    """In buckets, the height and width to draw each caption at: those of the pictures that have it, in turn."""
    if not images.sizes:
        return [None] * len(captions)
    places, turns, sizes = by_caption(images), dict[str, int](), list[tuple[int, int] | None]()
    for name in captions:
        turn = turns[name] = turns.get(name, -1) + 1
        sizes.append(images.shards.size_of(places[name][turn % len(places[name])]))
    return sizes


def even_indices(images: Images, count: int) -> list[int]:
    """`count` pictures or all there are, `even_among` their captions."""
    return even_among(by_caption(images), count)


def even_among(places: Mapping[str, Sequence[int]], count: int) -> list[int]:
    """`count` of the places or all there are: one of each caption in `mixed` order, then a second of those that have
    one, and so on; in the order in which they are stored, so that a shard from elsewhere is fetched once."""
    names = mixed(places)
    turns = sorted((turn, rank) for rank, name in enumerate(names) for turn in range(len(places[name])))
    return sorted(places[names[rank]][turn] for turn, rank in turns[:count])


def mixed(captions: Iterable[str]) -> list[str]:
    """The captions in the order of their hashes: the first of them are no kind of their own, as those would be that
    begin with the same word."""
    return sorted(captions, key=lambda caption: hashlib.sha256(caption.encode()).digest())


def check_crop(size: int | None, images: Images) -> None:
    """Raises UserError for a crop that is no part of the pictures."""
    side = min(min(size) for size in images.sizes) if images.sizes else min(images[0].data.shape[-2:])
    if size is not None and not 1 <= size <= side:
        what = f"--crop: must lie in 1 to {side}, the pictures' side (got {size})"
        raise UserError(what, hint="leave it out to measure whole pictures")
