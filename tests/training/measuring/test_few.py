"""Numbers that say little are told as such, and what is held out is found by one rule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from autoencoder.images import to_unit
from training.errors import UserError
from training.measuring.features import Features
from training.measuring.held_out import few_pictures
from training.shards.reading import ShardSet, held_out_shards


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of twelve numbers: roots of their covariances take no time."""

    def means(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(to_unit(pixels), 2).flatten(1)

    for room in ("evaluate", "generated"):
        monkeypatch.setattr(f"training.measuring.{room}.load_features", lambda *asked: Features("means", 12, means))


def evaluate(tmp_path: Path, *words: object) -> dict[str, Any]:
    assert tiny.call("evaluate", "--device", "cpu", "--output", tmp_path / "out.json", "--overwrite", *words) == 0
    return dict(json.loads((tmp_path / "out.json").read_text()))


def test_the_rule() -> None:
    assert few_pictures(960, 961) == []
    (singular,) = few_pictures(960, 960)
    assert "960 pictures in 960 feature dimensions" in singular and "singular" in singular
    assert [len(few_pictures(3, count)) for count in (3, 4, 99, 100)] == [2, 1, 1, 0]


def test_a_dozen_pictures_are_hardly_a_measure(
    autoencoder: Path, denoiser: Path, shapes: Path, tmp_path: Path, narrow: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in (autoencoder, denoiser):
        numbers = evaluate(tmp_path, "--model", model, "--data", shapes, "--count", 12)
        said = capsys.readouterr().err
        assert "warning: Frechet distances rest on 12 pictures in 12 feature dimensions" in said
        assert "--count 13 and more" in said and "--count 100 and more" in said
        assert "warning: 12 pictures say little" in said and len(numbers["warnings"]) == 2
        assert len(evaluate(tmp_path, "--model", model, "--data", shapes, "--count", 13)["warnings"]) == 1


def test_of_nine_pictures_nothing_is_said_of_the_set(
    autoencoder: Path, shapes: Path, tmp_path: Path, narrow: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is measured of each picture by itself stays."""
    numbers = evaluate(tmp_path, "--model", autoencoder, "--data", shapes, "--count", 9)
    assert numbers["psnr"] > 0 and len(numbers["psnr_95"]) == 2 and numbers["images"] == 9
    assert not [key for key in numbers if key.startswith(("frechet", "kernel_distance", "precision"))]
    assert "of fewer than 10 pictures say nothing and are left out (got 9)" in capsys.readouterr().err


@pytest.fixture
def splits(shapes: Path, tmp_path: Path) -> Callable[..., Path]:
    """The shapes with their splits renamed; those renamed to "" are taken out."""

    def make(**names: str) -> Path:
        folder = Path(shutil.copytree(shapes, tmp_path / "-".join(names.values())))
        index = json.loads((folder / "index.json").read_text())
        index["shards"] = [{**shard, "split": names[shard["split"]]} for shard in index["shards"]]
        index["shards"] = [shard for shard in index["shards"] if shard["split"]]
        (folder / "index.json").write_text(json.dumps(index))
        return folder

    return make


def test_one_rule_of_what_is_held_out(splits: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    test = "note: the data has no val split: its test split is what is held out"
    for names, wanted, said in (
        ({"train": "test", "val": "val"}, "val", ""),
        ({"train": "train", "val": "test"}, "test", test),
        ({"train": "train", "val": ""}, "train", "warning: the data has no val split"),
    ):
        folder = splits(**names)
        assert held_out_shards(folder).split == wanted
        assert (said in capsys.readouterr().err) if said else not capsys.readouterr().err
        if wanted == "train":
            with pytest.raises(UserError, match="no val and no test split") as caught:
                held_out_shards(folder, at_least="test")
            assert "--val-fraction" in caught.value.hint
        else:
            assert held_out_shards(folder, at_least="test").split == wanted


def test_only_a_test_split(
    splits: Callable[..., Path], denoiser: Path, autoencoder: Path, tmp_path: Path, narrow: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = splits(train="", val="test")
    numbers = evaluate(tmp_path, "--model", denoiser, "--data", folder, "--count", 10)
    assert "frechet_training" not in numbers and numbers["real_pictures"] == len(ShardSet(folder, "test"))
    said = capsys.readouterr().err
    assert "its test split is what is held out" in said and "distances of training pictures are left out" in said
    assert evaluate(tmp_path, "--model", autoencoder, "--data", folder, "--count", 4)["images"] == 4
    problem = tiny.refused("train_autoencoder", "--data", folder, "--output", tmp_path / "run", *tiny.AUTOENCODER)
    assert "no split 'train' (it has: test)" in problem.what and "to train on" in problem.hint


def test_captions_that_are_not_read_are_counted(
    denoiser: Path, shapes: Path, tmp_path: Path, narrow: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", denoiser, "--data", shapes, "--count", 10)
    assert evaluate(tmp_path, *words)["ledger"] == {}
    config = json.loads((denoiser / "final" / "tokenizer" / "vocabulary.json").read_text())
    vocabulary = config["vocabulary"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.text.tokenizer.WordTokenizer.unknown", lambda self, caption: [vocabulary[-1]])
        ledger = evaluate(tmp_path, *words)["ledger"]
    assert ledger["replaced"]["words that the vocabulary has not, read as unknown"]["count"] == 10
    assert "warning: replaced 10: words that the vocabulary has not" in capsys.readouterr().err
