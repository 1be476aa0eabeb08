"""Copies of training pictures: found where there are some, at the rate of chance where there are none."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from ldm.text import Reading
from training.data.samples import Batch
from training.errors import UserError
from training.ledger import Ledger
from training.measuring.copies import copies, mann_whitney, threshold, trained_on_data, verdict
from training.measuring.nearest import Search, nearest, pixel_space

SIDE = 6


class Pictures:
    """Packed pictures in memory; the caption of each is its number."""

    sizes = ()

    def __init__(self, name: str, data: Tensor) -> None:
        self.data = data
        self.shards = SimpleNamespace(
            key=lambda i: f"{name}-{i}", read_field=lambda i, field: f"{name} {i}".encode(), fields=("png",)
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: int) -> Batch:
        return Batch(self.data[[place]], torch.tensor([place]), [""])

    def evenly(self, count: int) -> Sequence[int]:
        if not 0 < count < len(self):
            return range(len(self))
        return [i * len(self) // count for i in range(count)]

    def chunks(self, places: Sequence[int], size: int, doing: str = "") -> Iterator[Batch]:
        for start in range(0, len(places), size):
            part = list(places[start : start + size])
            yield Batch(self.data[part], torch.tensor(part), [""] * len(part))


def law(count: int, seed: int) -> Tensor:
    """Independent pictures of noise."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=drawn)


class Model:
    """A pipeline that draws the given pictures in turn; its autoencoder changes nothing."""

    text = SimpleNamespace(readings=lambda captions: [Reading(1, 1)] * len(captions))

    def __init__(self, pictures: Tensor) -> None:
        self.pictures, self.asked = pictures, list[tuple[str, int]]()

    def autoencoder(self, images: Tensor, noise: None) -> tuple[Tensor, None]:
        return images, None

    def pixels(self, captions: list[str], seeds: list[int], *, sampling: Any, batch_size: int) -> Iterator[Tensor]:
        first = len(self.asked)
        self.asked += zip(captions, seeds, strict=True)
        yield self.pictures[first : first + len(captions)]


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The audit of a model that draws given pictures, for training and held-out pictures."""

    def of(pictures: Tensor, train: Tensor, held: Tensor, train_count: int = 0) -> dict[str, Any]:
        monkeypatch.setattr("training.measuring.copies.held_out", lambda args, what: Pictures("val", held))
        monkeypatch.setattr("training.measuring.copies.ShardSet", lambda folder, split: split)
        monkeypatch.setattr("training.measuring.copies.Images", lambda split: Pictures(split, train))
        monkeypatch.setattr("training.measuring.copies.trained_on_data", lambda args: True)
        model, grid = Model(pictures), str(tmp_path / "pairs.png")
        args = Namespace(data="data", count=len(pictures), seed=5, features="random", batch_size=30, grid=grid)
        args.train_count = train_count
        numbers = copies(model, "sampling", args, torch.device("cpu"), Ledger())  # type: ignore[arg-type]
        half = (len(pictures) + 1) // 2
        assert [seed for _, seed in model.asked] == list(range(5, 5 + len(pictures)))
        assert all(text.startswith("train" if i < half else "val") for i, (text, _) in enumerate(model.asked))
        return numbers

    return of


def test_a_model_of_training_pictures_copies_all(audit: Any) -> None:
    """Every second one mirrored; each is traced to the key of its original, in both spaces."""
    train = law(150, 0)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))[:60]
    drawn = train[order].clone()
    drawn[1::2] = drawn[1::2].flip(-1)
    numbers = audit(drawn, train, law(100, 2))
    assert numbers["copy_score"] == numbers["copy_score_pixels"] == numbers["copy_score_reconstructed"] == 1
    assert numbers["c_t"] < -10 and numbers["c_t_pixels"] < -10
    assert numbers["nearest_distinct"] == 60 and numbers["training_pictures"] == 150
    found = {row["picture"]: row for row in numbers["pairs"]}
    for i, place in enumerate(order.tolist()):
        assert found[i]["nearest"] == found[i]["nearest_pixels"] == f"train-{place}"
        assert found[i]["mirrored"] == bool(i % 2) and found[i]["ratio"] < 1e-3
    assert "repeats training pictures. To do: train on more pictures" in numbers["verdict"]


def test_independent_pictures_are_at_chance(audit: Any) -> None:
    """Drawn and held-out pictures are of one law: scores within the binomial bounds of chance, C_T within 3."""
    numbers = audit(law(300, 3), law(200, 4), law(600, 5))
    assert numbers["copy_chance"] == pytest.approx(15 / 301)
    for name in ("copy_score", "copy_score_held_out", "copy_score_pixels", "copy_score_held_out_pixels"):
        assert within(round(300 * numbers[name]), 300, numbers["copy_chance"]), name
    assert abs(numbers["c_t"]) < 3 and abs(numbers["c_t_pixels"]) < 3
    assert "no sign of copies" in numbers["verdict"]


def within(hits: int, count: int, chance: float) -> bool:
    """Whether so many hits are neither among the 0.1 % least nor the 0.1 % most likely of a binomial law."""
    tail = [comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(count + 1)]
    return sum(tail[: hits + 1]) > 1e-3 and sum(tail[hits:]) > 1e-3


def test_half_of_the_pictures_copied(audit: Any) -> None:
    """Those of training captions alone: each kind of caption has its own score."""
    train = law(150, 0)
    numbers = audit(torch.cat([train[:40], law(40, 9)]), train, law(200, 2))
    assert numbers["copy_score_training_captions"] == 1 and numbers["copy_score_held_out_captions"] < 0.2
    assert [row["picture"] < 40 for row in numbers["pairs"][:41]] == [True] * 40 + [False]


def test_a_part_of_the_training_pictures_is_told(audit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train = law(150, 0)
    numbers = audit(train[:10], train, law(40, 2), 15)
    assert numbers["training_pictures"] == 15 and numbers["training_split"] == 150
    assert "15 of 150 training pictures are searched" in capsys.readouterr().err
    assert [row["picture"] for row in numbers["pairs"] if row["distance"] < 1e-4] == [0]  # of 10, one is among them


def test_too_few_held_out_pictures_are_refused(audit: Any) -> None:
    with pytest.raises(UserError, match="20 held-out pictures or more, the data hold out 19") as caught:
        audit(law(4, 0), law(30, 1), law(19, 2))
    assert caught.value.hint.startswith("hold more of them out: ") and "--val-fraction 0.5" in caught.value.hint


def test_the_threshold_is_an_order_statistic() -> None:
    """Of n distances the floor((n + 1) / 20)-th, the first at least; below it lies a further one with k / (n + 1)."""
    shuffled = torch.randperm(99, generator=torch.Generator().manual_seed(0)).float()
    assert threshold(shuffled) == (4.0, 0.05)
    assert threshold(torch.tensor([3.0, 1.0, 2.0] * 3 + [5.0])) == (1.0, 1 / 11)


def test_mann_whitney_by_brute_force() -> None:
    """U over all pairs, its mean and variance over all ways to deal the same values out, ties among them."""
    values = [0.0, 1.0, 1.0, 1.0, 2.0, 3.0, 3.0, 7.0]

    def u(chosen: tuple[int, ...]) -> float:
        ours, theirs = ([x for i, x in enumerate(values) if (i in chosen) == side] for side in (True, False))
        return sum((a > b) + (a == b) / 2 for a in ours for b in theirs)

    every = [u(chosen) for chosen in combinations(range(8), 3)]
    mean = sum(every) / len(every)
    spread = (sum((x - mean) ** 2 for x in every) / len(every)) ** 0.5
    for chosen in ((0, 1, 2), (2, 4, 7), (5, 6, 7)):
        ours = torch.tensor([values[i] for i in chosen])
        theirs = torch.tensor([x for i, x in enumerate(values) if i not in chosen])
        assert mann_whitney(ours, theirs) == pytest.approx((u(chosen) - mean) / spread, abs=1e-9)
    assert mann_whitney(torch.ones(3), torch.ones(4)) == 0.0
    assert mann_whitney(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])) == pytest.approx(-2 / (5 / 3) ** 0.5)


def test_the_search_is_exact_however_it_is_cut() -> None:
    """Against all distances in float64; equal points give the first; far from the origin copies stay at 0."""
    drawn = torch.Generator().manual_seed(0)
    points = 1000 + torch.randn(50, 8, generator=drawn)
    points[30] = points[7]
    queries = torch.cat([1000 + torch.randn(20, 8, generator=drawn), points[[7, 30, 49]]])
    wanted = torch.cdist(queries.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist").min(1)
    for size in (1, 7, 50):
        search = Search(queries)
        for start in range(0, 50, size):
            search.look(points[start : start + size], torch.arange(50)[start : start + size])
        assert search.place.tolist() == wanted.indices.tolist() and search.place[-3:].tolist() == [7, 7, 49]
        assert torch.allclose(search.best.double(), wanted.values, atol=1e-3)
        assert (search.best[-3:] == 0).all()


def test_distances_in_pixels_are_root_mean_squares() -> None:
    """Of colours in [0, 1], averaged to 16 x 16: a picture 51 brighter is 0.2 away."""
    dark = torch.full((1, 3, 32, 48), 100, dtype=torch.uint8)
    spaces, train, device = {"pixels": pixel_space(32, 48)}, Pictures("train", dark), torch.device("cpu")
    found = nearest(spaces, [dark + 51], train, [0], device)  # type: ignore[arg-type]
    assert found["pixels"].distance.item() == pytest.approx(0.2, abs=1e-6) and not found["pixels"].mirrored.item()


def test_the_verdict_is_in_plain_words() -> None:
    clear = {"copy_chance": 0.05, "copy_score_reconstructed": 1.0, "c_t": 0.3}
    clear |= {"copy_score_training_captions": 0.2, "copy_score_held_out_captions": 0.04}
    said = verdict(clear | {"copy_score": 0.12, "copy_score_95": [0.08, 0.17]})
    assert said.startswith(
        "12.0% of the pictures (8.0% to 17.0%) lie nearer to a training picture than 95.0% of held-out pictures do "
        "(5.0% would be chance); of those of training captions 20.0%, of held-out captions 4.0%; C_T 0.3: "
        "the model repeats training pictures."
    )
    few = {"copy_score": 0.06, "copy_score_95": [0.03, 0.1]}
    assert verdict(clear | few).endswith("no sign of copies")
    assert "as a whole they lie nearer" in verdict(clear | few | {"c_t": -3.5})
    blurred = verdict(clear | {"copy_score": 0.12, "copy_score_95": [0.08, 0.17], "copy_score_reconstructed": 0.4})
    assert "copies, or pictures so blurred" in blurred and "repeats training pictures" not in blurred
    blind = verdict(clear | few | {"copy_score_reconstructed": 0.4})
    assert "says little, for of training pictures that went through the autoencoder only 40% do" in blind


def test_a_run_knows_its_pictures(
    denoiser: Path,
    shapes: Path,
    grey: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the door: the pictures its latents were encoded from, or others; the sheet, and every pair by its key."""
    monkeypatch.setattr("training.measuring.copies.LEAST", 19)  # as many as the data hold out
    words = ("--model", denoiser, "--data", shapes, "--copies", "--count", 10, "--device", "cpu", "--grid")
    output = ("--output", tmp_path / "out.json")
    assert tiny.call("evaluate", *words, tmp_path / "pairs.png", *output) == 0
    said = capsys.readouterr()
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["trained_on_data"] is True and "trained on" not in said.err
    assert said.out.count(numbers["verdict"]) == 1 and (tmp_path / "pairs.png").is_file()
    assert [numbers[n] for n in ("pictures", "training_pictures", "held_out_pictures")] == [10, 96, 19]
    assert all(row["nearest"].startswith("train-") for row in numbers["pairs"]) and len(numbers["pairs"]) == 10
    ratios = [row["ratio"] for row in numbers["pairs"]]
    assert ratios == sorted(ratios)
    assert trained_on_data(Namespace(model=denoiser / "final", data=shapes)) is True
    assert trained_on_data(Namespace(model=denoiser, data=grey / "data")) is False
    assert "was trained on other pictures" in capsys.readouterr().err
    assert trained_on_data(Namespace(model="demo", data=shapes)) is None
    assert "demo does not say which pictures it was trained on" in capsys.readouterr().err
