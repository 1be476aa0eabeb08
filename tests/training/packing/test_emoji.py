"""The emoji package as a source: what is packed of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from training.packing.builtin_sources import Emoji
from training.packing.sources import Remark, Sample

SMILE = {"name": "SMILE FACE", "category": "Smileys & Emotion", "image": "1f600.png"}
WAVE = {
    "name": "WAVING HAND", "category": "People & Body", "image": "1f44b.png",
    "skin_variations": {"1F3FB": {"image": "1f44b-1f3fb.png"}, "1F3FF": {"image": "1f44b-1f3ff.png"}},
}
LEFT_OUT = [
    {"name": "FLAG", "category": "Flags", "image": "flag.png"},
    {"name": "TONE", "category": "Component", "image": "tone.png"},
    {"name": "NOT DRAWN", "category": "Objects", "image": "missing.png"},
]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    root = tmp_path / "package"
    pictures = root / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    (root / "emoji.json").write_text(json.dumps([WAVE, SMILE, *LEFT_OUT]))
    for name in ("1f600", "1f44b", "1f44b-1f3fb", "1f44b-1f3ff", "flag", "tone", "unnamed"):
        values = np.random.default_rng(len(name)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(pictures / f"{name}.png")
    return root


def captions(root: Path) -> dict[str, tuple[str, ...]]:
    found = list(Emoji(root).samples())
    assert all(isinstance(sample, Sample) for sample in found)
    return {sample.key: sample.captions for sample in found}  # type: ignore[union-attr]


def test_names_and_categories_are_the_captions(package: Path) -> None:
    wave = ("waving hand, people & body", "waving hand")
    smile = ("smile face, smileys & emotion", "smile face")
    expected = {"1f44b-1f3fb": wave, "1f44b-1f3ff": wave, "1f44b": wave, "1f600": smile}
    assert captions(package) == expected and list(captions(package)) == list(expected)


def test_it_packs_the_bytes_of_a_folder_with_metadata(package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = []
    for key, texts in captions(package).items():
        (folder / f"{key}.png").write_bytes((package / "img" / "google" / "64" / f"{key}.png").read_bytes())
        rows.append(json.dumps({"file_name": f"{key}.png", "text": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    flags = ("--resolution", 64, "--val-fraction", 0.5, "--output")
    assert tiny.call("make_shards", "pack", "emoji", "--root", package, *flags, tmp_path / "emoji") == 0
    assert tiny.call("make_shards", "pack", folder, *flags, tmp_path / "plain") == 0
    packed = {path.name: path.read_bytes() for path in (tmp_path / "emoji").glob("*.tar")}
    assert packed and packed == {path.name: path.read_bytes() for path in (tmp_path / "plain").glob("*.tar")}


def test_another_name_is_another_state(package: Path) -> None:
    before = Emoji(package).state()
    assert Emoji(package).state() == before
    (package / "emoji.json").write_text(json.dumps([WAVE, {**SMILE, "name": "GRIN"}]))
    assert Emoji(package).state() != before


def test_a_picture_that_is_too_large_is_a_remark(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.packing.builtin_sources.LARGEST_FILE", 10)
    assert all(isinstance(item, Remark) for item in Emoji(package).samples())


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"name": "x"}]', "no JSON", None])
def test_what_is_no_package_is_refused(text: Any, package: Path, tmp_path: Path) -> None:
    listing = package / "emoji.json"
    if text is None:
        listing.unlink()
    else:
        listing.write_text(text)
    words = ("pack", "emoji", "--root", package, "--output", tmp_path / "out")
    problem = tiny.refused("make_shards", *words)
    assert problem.code == 3 and str(package) in problem.what and not (tmp_path / "out").exists()
    assert "--root" in tiny.refused("make_shards", "pack", "emoji", "--output", tmp_path / "out").hint
