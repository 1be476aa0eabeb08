"""Curves of the numbers of runs: which share axes, what they mean, and how many points stand for a long training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from training.pages.record import Points, Record
from training.pictures import html

POINTS = 60_000  # on a page
MOST, LEAST = 500, 50  # of one line
COLOURS = ("#3b82c4", "#d9534f", "#3a9d5d", "#9467bd", "#e08a1e", "#17a2b8", "#c0629a", "#8c8c3a")
LEVEL = re.compile(r"val/loss_t([\d.]+)")
UNEXPLAINED = ""


@dataclass(frozen=True)
class Meaning:
    """What the names that `pattern` fits are, and how they are read."""

    pattern: str
    title: str
    about: str
    up: str = ""
    log: bool = False


MEANINGS = (
    Meaning(
        "loss", "Training loss",
        "What the optimiser lowers. Each step sees other samples and noise: read the smoothed line, not single steps.",
        log=True,
    ),
    Meaning(
        r"loss_\w+", "Parts of the training loss",
        "Each by itself; of networks that take turns, over the steps of its own turns.",
    ),
    Meaning(
        "val/loss(_train)?", "Validation loss",
        "With averaged weights: of held-out samples, and as loss_train of as many training samples, measured alike. "
        "These falling while held-out ones rise is over-fitting. The training loss weighs noise levels otherwise.",
    ),
    Meaning(
        "val/.*_gap", "Validation gap",
        "How much better training samples are than held-out ones. It opens slowly; growing while held-out ones become "
        "worse, it tells of over-fitting.",
    ),
    Meaning(LEVEL.pattern, "Validation loss by noise level", UNEXPLAINED),
    Meaning(
        "val/(teacher_)?psnr(_train)?", "PSNR",
        "Of reconstructions of held-out pictures, as psnr_train of training ones: 3 dB more is half the squared error.",
        "dB",
    ),
    Meaning("val/(teacher_)?ssim", "SSIM", "Held-out reconstructions, local structure: 1 is the same picture."),
    Meaning(
        "val/(teacher_)?lpips", "LPIPS",
        "Held-out reconstructions, distance in a network's features: less is better, comparable for one network alone.",
    ),
    Meaning(
        "grad_norm/.*", "Gradient norms",
        "Before the clip. A slow fall is usual; a lasting rise, or peaks far above the rest, come before a divergence: "
        "lower the learning rate or the clip.", log=True,
    ),
    Meaning("lr", "Learning rate", "After warm-up and decay, of each step."),
    Meaning("kl", "KL", "What the latents tell of a picture beyond N(0, 1): with a small weight it may grow."),
    Meaning("adversarial", "Adversarial loss", "Of the autoencoder, against the discriminator; it need not fall."),
    Meaning("discriminator", "Discriminator's loss", "Near 0 it has won, and its gradient says little."),
    Meaning("balance", "Adversarial weight", "What balances the adversarial gradient with the reconstruction's."),
    Meaning("images_per_second", "Speed", "Of training steps, without validation.", "images/s"),
    Meaning("data_wait", "Waiting for data", "Share of the time; far from 0, raise --num-workers.", "share"),
)  # fmt: skip


def meaning_of(name: str) -> Meaning:
    """The meaning of a name; one that is not known means itself."""
    return next((m for m in MEANINGS if re.fullmatch(m.pattern, name)), Meaning(name, name, UNEXPLAINED))


def all_series(record: Record) -> dict[str, Points]:
    """What is drawn of a run: its metrics, and of timing.jsonl speed and waiting."""
    timing = {name: record.timing.series.get(name, []) for name in ("images_per_second", "data_wait")}
    return {**record.metrics.series, **{name: points for name, points in timing.items() if points}}


def names_in_order(names: Iterable[str]) -> list[str]:
    """As `MEANINGS` stand, names without one at the end."""
    patterns = [meaning.pattern for meaning in MEANINGS]

    def place(name: str) -> tuple[int, str]:
        pattern = meaning_of(name).pattern
        return (patterns.index(pattern) if pattern in patterns else len(patterns)), name

    return sorted(set(names), key=place)


def of_one(record: Record) -> list[str]:
    """The plots of one run: names of one meaning share their axes."""
    series = all_series(record)
    groups: dict[str, list[str]] = {}
    for name in names_in_order(series):
        groups.setdefault(meaning_of(name).pattern, []).append(name)
    points = _points(len(series))
    return [
        plot(meaning_of(names[0]), {name: thinned(series[name], points) for name in names}, smooth=_noisy(names[0]))
        for names in groups.values()
    ]


def of_several(records: Sequence[Record]) -> list[str]:
    """The plots of several runs: a pair of axes for each name, a line for each run that has it."""
    series = {record.name: all_series(record) for record in records}
    names = names_in_order(name for found in series.values() for name in found)
    points, plots = _points(sum(map(len, series.values()))), []
    for name in names:
        lines = {run: thinned(found[name], points) for run, found in series.items() if name in found}
        meaning = meaning_of(name)
        alone = sum(meaning_of(other) == meaning for other in names) == 1
        title = meaning.title if alone else f"{meaning.title}: {name}"
        plots.append(plot(meaning, lines, title=title, smooth=_noisy(name), runs=list(series)))
    return plots


def plot(
    meaning: Meaning, lines: Mapping[str, Any], *, title: str = "", smooth: bool = False, across: str = "step",
    runs: Sequence[str] = (),
) -> str:  # fmt: skip
    """One pair of axes; `runs` keeps the colour of a run the same on all of them."""
    order = list(runs) or list(lines)
    drawn = [
        {"name": name, "colour": COLOURS[order.index(name) % len(COLOURS)], "points": points}
        for name, points in lines.items()
    ]
    data = {"lines": drawn, "across": across, "up": meaning.up, "log": meaning.log, "smooth": smooth}
    about = f"<p>{escape(meaning.about)}</p>" if meaning.about else ""
    return f'<figure class="plot"><h3>{escape(title or meaning.title)}</h3>{about}{html.embedded(data)}</figure>'


def thinned(points: Points, most: int) -> list[list[float]]:
    """At most `most` of [step, mean, lowest, highest], each over neighbouring steps; [step, value] where all are kept.

    Group g of G covers the points floor(g n / G) to floor((g+1) n / G), and stands at the last step of them.
    """
    if len(points) <= most:
        return [[step, _short(value)] for step, value in points]
    edges = [group * len(points) // most for group in range(most + 1)]
    parts = [points[a:b] for a, b in pairwise(edges)]
    values = [[value for _, value in part] for part in parts]
    return [
        [part[-1][0], _short(sum(seen) / len(seen)), _short(min(seen)), _short(max(seen))]
        for part, seen in zip(parts, values, strict=True)
    ]


def grouping(records: Sequence[Record]) -> str:
    """What a point of the curves stands for, as a sentence."""
    lines = [points for record in records for points in all_series(record).values()]
    most = _points(len(lines))
    size = max((-(-len(points) // most) for points in lines), default=1)
    told = "Each point is one step." if size == 1 else (
        f"A point is the mean of up to {size:,} neighbouring steps, the light band around it from the lowest to the "
        "highest of them."
    )  # fmt: skip
    skipped = [f" Of {r.name} one training step in {r.metrics.every} was read." for r in records if r.metrics.every > 1]
    return told + "".join(skipped)


def last_numbers(record: Record) -> str:
    """A table of every number of a run: the last one, the lowest, the highest and where they were."""
    rows = []
    for name in names_in_order(series := all_series(record)):
        points = series[name]
        low, high = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
        rows.append([name, points[-1][1], points[-1][0], low[1], low[0], high[1], high[0]])
    return html.table(("", "last", "at step", "lowest", "at step", "highest", "at step"), rows)


def _noisy(name: str) -> bool:
    """Whether smoothing says more of a name: validations are few, and a rate is no measurement."""
    return not name.startswith("val/") and name != "lr"


def _points(lines: int) -> int:
    return max(LEAST, min(MOST, POINTS // max(1, lines)))


def _short(value: float) -> float:
    return float(f"{value:.5g}")
