"""Distances between sets of pictures and the obedience of drawn ones, by hand for a pipeline that draws what we say."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmd import kernel_distance
from PIL import Image
from torch import Tensor

from autoencoder.images import to_uint8, to_unit
from ldm.text import Reading
from training.data.images import Images
from training.ledger import Ledger
from training.measuring.distances import frechet_distance, wilson
from training.measuring.features import Features
from training.measuring.generated import distances
from training.measuring.held_out import even_captions, even_indices
from training.measuring.obedience import shapes_obedience
from training.models.judge import caption
from training.pictures import grids
from training.shards.reading import ShardSet


class Darker:
    """What reconstructions are like."""

    image_channels = 3

    def __call__(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return images.clamp(-0.5, 0.5), images


class Painter:
    """A pipeline whose picture of a caption is that of the data shown to it, somewhat darker; it notes its requests."""

    def __init__(self, known: dict[str, Tensor]) -> None:
        self.known, self.asked = known, list[tuple[list[str], list[int]]]()
        self.autoencoder = Darker()
        self.text = SimpleNamespace(readings=lambda captions: [Reading(1, 1)] * len(captions))

    def pixels(self, captions: list[str], seeds: list[int], *, sampling: Any, batch_size: int) -> Iterator[Tensor]:
        assert sampling == "sampling" and batch_size == len(captions)
        self.asked.append((captions, seeds))
        yield torch.stack([self.known[caption] for caption in captions]) // 2


class Knows(torch.nn.Module):
    """A judge that names what the painter drew, but for the captions it does `miss`."""

    def __init__(self, known: dict[str, Tensor], miss: list[str]) -> None:
        super().__init__()
        self.known, self.classes, self.miss = known, tuple(known), miss

    def forward(self, pixels: Tensor) -> Tensor:
        drawn = [next(c for c in self.classes if torch.equal(self.known[c] // 2, picture)) for picture in pixels]
        answers = [(self.classes.index(c) + (c in self.miss)) % len(self.classes) for c in drawn]
        return torch.nn.functional.one_hot(torch.tensor(answers), len(self.classes)).float()


def means(pixels: Tensor) -> Tensor:
    """The mean colours of a picture's quarters, (B, 12)."""
    return torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 2).flatten(1)


def everything(images: Images) -> Tensor:
    return next(images.chunks(range(len(images)), len(images))).data


def test_each_distance_is_between_the_sets_it_names(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All held-out pictures against drawn, reconstructed and training ones; a judge who misses two of twelve."""
    held_out, training = (Images(ShardSet(shapes, split)) for split in ("val", "train"))
    real, features = everything(held_out), Features("means", 12, means)
    monkeypatch.setattr("training.measuring.generated.load_features", lambda spec, device: features)
    painter = Painter({caption(held_out, i): picture for i, picture in enumerate(real)})
    captions = even_captions(held_out, 12)
    monkeypatch.setattr(
        "training.measuring.generated.load_classifier", lambda folder, device: Knows(painter.known, captions[3:5])
    )
    args = Namespace(data=shapes, features="means", obedience="judge", clip=None, count=12, seed=3, batch_size=5)
    numbers = distances(painter, "sampling", args, torch.device("cpu"), Ledger())
    assert [pair for part in painter.asked for pair in zip(*part, strict=True)] == [(c, 3) for c in captions]
    sets = {
        "generated": torch.stack([painter.known[name] for name in captions]) // 2,
        "reconstructed": to_uint8(to_unit(real[even_indices(held_out, 12)]).clamp(-0.5, 0.5)),
        "training": everything(training)[even_indices(training, 12)],
    }
    for name, pixels in sets.items():
        wanted = frechet_distance(features(real), features(pixels))
        assert numbers[f"frechet_{name}"] == pytest.approx(wanted, rel=1e-3), name
    assert numbers["frechet_ratio"] == pytest.approx(numbers["frechet_generated"] / numbers["frechet_reconstructed"])
    kernel = kernel_distance(features(real), features(sets["generated"]))
    assert numbers["kernel_distance"] == pytest.approx(kernel, rel=1e-3)
    assert numbers["obedience"] == 10 / 12 and numbers["obedience_95"] == list(wilson(10, 12))
    counts = [numbers[name] for name in ("pictures", "real_pictures", "kernel_pictures", "kernel_real_pictures")]
    assert counts == [12, len(held_out), 12, len(held_out)]


def test_a_grid_says_which_captions_are_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules are asked about each picture with its own caption; the first of each number of objects are shown."""
    prompts = {n: [f"{n} objects, caption {i}" for i in range(4)] for n in (1, 2, 3)}
    known = {c: torch.full((3, 8, 8), 40 * i + n, dtype=torch.uint8) for n, own in prompts.items()
             for i, c in enumerate(own)}  # fmt: skip

    def check(image: np.ndarray, prompt: str) -> dict[str, bool]:
        assert (image == np.asarray(known[prompt][0, 0, 0] // 2)).all()
        return {"obeyed": prompt.endswith(("0", "2")) or prompt.startswith("2"), "colour": prompt.endswith("0")}

    monkeypatch.setattr("training.shapes.checker.check", check)
    wanted = "training.shapes.wording.held_out_prompts"
    monkeypatch.setattr(wanted, lambda count, objects, seed: prompts[objects][:count])
    args, painter = Namespace(count=4, seed=7, batch_size=3, grid=str(tmp_path / "grid.png")), Painter(known)
    numbers = shapes_obedience(painter, "sampling", args, Ledger())  # type: ignore[arg-type]
    assert painter.asked[:2] == [(prompts[1][:3], [7] * 3), (prompts[1][3:], [7])]
    assert [numbers[f"obedience_{n}"] for n in (1, 2, 3)] == [0.5, 1.0, 0.5]
    assert [numbers[f"obedience_{n}_colour"] for n in (1, 2, 3)] == [0.25] * 3
    assert numbers["obedience_1_95"] == list(wilson(2, 4)) and numbers["grid"] == "grid.png"
    said = [c for own in prompts.values() for c in own[:3]]  # of the first batch of each
    obeyed = [True, False, True, True, True, True, True, False, True]
    wanted = grids.grid(torch.stack([known[c] for c in said]) // 2, 8, captions=said, marks=obeyed)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(wanted))
