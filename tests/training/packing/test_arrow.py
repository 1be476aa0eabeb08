"""Parquet files and saved Hugging Face data sets as sources, and what is said where pyarrow is missing."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from packs import pack, png, refused, write


def parquet(path: Path, columns: dict[str, list[Any]], metadata: dict[bytes, bytes] | None = None) -> Path:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = arrow.table(columns)
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata) if metadata else table, path)
    return path


def images(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": png(first + i), "path": f"{i}.png"} for i in range(count)]


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"x.parquet": b"PAR1", "in/a.png": png(0), "in/metadata.parquet": b"PAR1"})
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for source in ("x.parquet", "in"):
        error = refused(tmp_path / source, tmp_path / "no")
        assert error.code == 3 and "need pyarrow" in error.what and error.hint == "pip install pyarrow"


def test_shards_of_the_hub(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("validation", 50)):
        columns = {"image": images(40, first), "text": [f"{split} {i}" for i in range(40)], "n": list(range(40))}
        parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", columns)
    hint = refused(tmp_path, tmp_path / "no").hint
    packed = pack(shlex.split(hint.partition(": ")[2])[0], tmp_path / "out")
    key = "validation-00000-of-00001/000000007"
    assert packed.captions[key] == ["validation 7"] and packed.meta[key] == {"n": 7}
    assert {split: len(keys) for split, keys in packed.splits.items()} == {"train": 40, "val": 40}
    assert packed.counts("guessed") == {"split taken from a file's or folder's name": 2}


def test_files_whose_names_make_the_same_key(tmp_path: Path) -> None:
    for seed, name in enumerate(("x.1", "x_1", "x_1_")):
        parquet(tmp_path / f"{name}.parquet", {"image": images(1, seed), "text": [name]})
    packed = pack(tmp_path / "*.parquet", tmp_path / "out")
    assert {caption for (caption,) in packed.captions.values()} == {"x.1", "x_1", "x_1_"}


def test_columns(tmp_path: Path) -> None:
    columns = {"photo": [png(0), None, b"?"], "mask": images(3), "prompt": ["one", "two", "three"]}
    path = parquet(tmp_path / "x.parquet", columns)
    error = refused(path, tmp_path / "no")
    assert "several columns of pictures (photo, mask)" in error.what and "--image-field photo" in error.hint
    assert "--caption-column prompt" in refused(path, tmp_path / "no", "--image-field", "mask").hint
    flags = ("--image-field", "photo", "--caption-column", "prompt", "--on-bad-data", "skip")
    packed = pack(path, tmp_path / "out", *flags)
    assert packed.captions == {"x/000000000": ["one"]}
    assert packed.counts("left out") == {"no image": 1, "not an image of a known format": 1}
    assert "no column of pictures" in refused(path, tmp_path / "no", "--image-field", "prompt").what
    assert "no such column" in refused(path, tmp_path / "no", *flags[:2], "--caption-column", "wrong").what
    for data in (b"PAR1" + bytes(99) + b"PAR1", b"words"):
        path.write_bytes(data)
        assert "damaged file" in refused(path, tmp_path / "no").what


def test_class_labels_are_told_by_name(tmp_path: Path) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    facts = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    path = parquet(tmp_path / "x.parquet", {"image": images(2), "label": [1, 0]}, facts)
    packed = pack(path, tmp_path / "out", "--caption-column", "label")
    assert list(packed.captions.values()) == [["dog"], ["cat"]]


def test_metadata_as_parquet(tmp_path: Path) -> None:
    parquet(tmp_path / "in/metadata.parquet", {"file_name": ["a.png"], "text": [["one", "two"]]})
    assert pack(write(tmp_path / "in", {"a.png": png(0)}), tmp_path / "out").captions == {"a": ["one", "two"]}


def test_what_the_datasets_package_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": images(3), "text": ["a", "b", "c"]}
    train = datasets.Dataset.from_dict(rows, features=features)
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(tmp_path / "several")
    packed = pack(tmp_path / "one", tmp_path / "out")
    assert list(packed.captions.values()) == [["a"], ["b"], ["c"]]
    packed = pack(tmp_path / "several", tmp_path / "both")
    assert {split: len(keys) for split, keys in packed.splits.items()} == {"train": 3, "test": 1}
    train.to_parquet(tmp_path / "x.parquet")
    assert list(pack(tmp_path / "x.parquet", tmp_path / "third").captions.values()) == [["a"], ["b"], ["c"]]
