"""The family of measures between two sets of pictures: what each is, of how many pictures, and its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.measuring import bootstrap, kernels
from training.measuring.distances import frechet_cost, frechet_distance, wilson
from training.measuring.networks.base import Features
from training.measuring.precision_recall import neighbours

PAIRS = 5000  # pictures of each set at most that a measure compares in pairs
SUBSETS, SUBSET = 100, 1000  # of KID, as published
K, K_DENSITY = 3, 5


class Pair(NamedTuple):
    """Features of real pictures (N, D) and of others (M, D). `paired`: picture i of one belongs to i of the other."""

    real: Tensor
    other: Tensor
    seed: int = 0
    paired: bool = False


class Found(NamedTuple):
    """A number, its 95 % interval, and how many resamples that rests on (0: none was drawn)."""

    name: str
    value: float
    interval: list[float] | None
    resamples: int = 0


@dataclass(frozen=True)
class Measure:
    """One line of the table. `kind`: the word that the name of a feature network must begin with."""

    names: tuple[str, ...]
    definition: str
    compute: Callable[[Pair], Iterator[Found]]
    in_pairs: bool = True
    kind: str = ""


def frechet(pair: Pair) -> Iterator[Found]:
    """The Frechet distance, by as many resamples as can be afforded."""
    count = bootstrap.replicates(frechet_cost(len(pair.real), len(pair.other), pair.real.shape[1]))
    value = frechet_distance(pair.real, pair.other)
    deviation = bootstrap.of_sets(frechet_distance, pair.real, pair.other, count, pair.seed, pair.paired)
    yield Found("frechet", value, bootstrap.around(value, deviation, 0.0), count)


def kernel_distance(pair: Pair) -> Iterator[Found]:
    """KID over all pairs; as published also its deviation over subsets, where there are pictures for these."""
    yield _resampled("kernel_distance", kernels.Cubic(), kernels.unbiased, pair)
    if min(len(pair.real), len(pair.other)) >= SUBSET:
        weights = tuple(_subsets(len(rows), pair.seed + place) for place, rows in enumerate(pair[:2]))
        values = kernels.unbiased(kernels.sums(kernels.Cubic(), pair.real, pair.other, *weights), *weights)
        yield Found("kernel_distance_subset_std", values.std(correction=0).item(), None)


def clip_mmd(pair: Pair) -> Iterator[Found]:
    """1000 times the biased squared MMD of a Gaussian kernel."""
    yield _resampled("clip_mmd", kernels.Gaussian(), kernels.biased, pair, 1000.0)


def precision_recall(pair: Pair) -> Iterator[Found]:
    """Shares with Wilson's intervals, density with that of a mean; the balls, made of the other set, as they are."""
    found = neighbours(pair.real, pair.other, K, K_DENSITY)
    for name, verdicts in (("precision", found.precise), ("recall", found.recalled), ("coverage", found.covered)):
        hits = int(verdicts.sum())
        yield Found(name, hits / len(verdicts), list(wilson(hits, len(verdicts))))
    value = found.density.mean().item()
    yield Found("density", value, bootstrap.around(value, bootstrap.of_mean(found.density), 0.0))


MEASURES = (
    Measure(
        ("frechet",),
        "Frechet distance of Gaussians, |mu - mu'|^2 + tr(A + B - 2 (A B)^(1/2)), unbiased covariances, float64",
        frechet,
        in_pairs=False,
    ),
    Measure(
        ("kernel_distance", "kernel_distance_subset_std"),
        f"unbiased squared MMD, kernel (x.y / D + 1)^3, all pairs; std of {SUBSETS} subsets of {SUBSET}",
        kernel_distance,
    ),
    Measure(
        ("precision", "recall", "coverage", "density"),
        f"improved precision and recall, k = {K}, closed balls; density and coverage, k = {K_DENSITY}, open balls",
        precision_recall,
    ),
    Measure(
        ("clip_mmd",),
        "1000 times the biased squared MMD, kernel exp(-|x - y|^2 / 200), embeddings of length 1",
        clip_mmd,
        kind="CLIP",
    ),
)
INTERVALS = (
    "95 %: distances by value +- 1.96 deviations over resampled pictures, at this number of pictures; shares by Wilson,"
    " density by its pictures, the other set's as they are"
)


def applying(features: Features) -> list[Measure]:
    """The measures that this network is made for."""
    return [measure for measure in MEASURES if features.name.startswith(measure.kind)]


def definitions(features: Features) -> dict[str, str]:
    """The measures as the protocol states them."""
    return {measure.names[0]: measure.definition for measure in applying(features)}


def compare(features: Features, pair: Pair, name: Callable[[str], str]) -> dict[str, Any]:
    """Every number of the two sets, `name`d, its interval beside it as NAME_95, the resamples of it as NAME_resamples;
    and again under the name by which this measure in this network is known."""
    numbers: dict[str, Any] = {}
    fewer = Pair(_some(pair.real, pair.seed), _some(pair.other, pair.seed), pair.seed, pair.paired)
    for measure in applying(features):
        for found in measure.compute(fewer if measure.in_pairs else pair):
            for key in (found.name, *_published(features, found.name)):
                numbers |= _stored(name(key), found)
    return numbers


def _published(features: Features, name: str) -> Iterator[str]:
    if known := features.published.get(name):
        yield known


def _stored(key: str, found: Found) -> dict[str, Any]:
    beside: dict[str, Any] = {f"{key}_95": found.interval} if found.interval else {}
    return {key: found.value} | beside | ({f"{key}_resamples": found.resamples} if found.resamples else {})


def _some(rows: Tensor, seed: int) -> Tensor:
    """PAIRS of the rows, keyed by `seed`; all where there are no more. Not every n-th: captions come in turns."""
    if len(rows) <= PAIRS:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:PAIRS]
    return rows[chosen.sort().values]


def _subsets(size: int, seed: int) -> Tensor:
    """SUBSETS rows of `size` weights, SUBSET of them 1, chosen without replacement."""
    keys = torch.rand(SUBSETS, size, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(SUBSETS, size, dtype=torch.float64).scatter_(1, keys.topk(SUBSET, dim=1).indices, 1.0)


def _resampled(name: str, kernel: kernels.Kernel, statistic: Any, pair: Pair, scale: float = 1.0) -> Found:
    """The statistic of the sets as they are (the first row of the weights), and of resamples."""
    count, weights = bootstrap.REPLICATES, []
    for place, rows in enumerate(pair[:2]):
        seed = pair.seed if pair.paired else pair.seed + place
        drawn = bootstrap.multiplicities(bootstrap.resamples(len(rows), count, seed))
        weights.append(torch.cat([torch.ones(1, len(rows), dtype=torch.float64), drawn]))
    values = scale * statistic(kernels.sums(kernel, pair.real, pair.other, *weights), *weights)
    value = values[0].item()
    return Found(name, value, bootstrap.around(value, values[1:].std().item()), count)
