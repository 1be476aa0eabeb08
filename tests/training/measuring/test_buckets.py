"""What is measured of pictures in buckets, and what says by name that it is not."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from training.data.images import Images
from training.drawing.requests import ask
from training.errors import UserError
from training.measuring import generated
from training.measuring.held_out import check_crop, held_out, of_one_size, parts, sizes_of_captions
from training.shards.reading import ShardSet


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide and square pictures of three captions, all of them held out but for some."""
    source, folder = tmp_path_factory.mktemp("shaped"), tmp_path_factory.mktemp("data") / "buckets"
    for n in range(30):
        shape = (50, 90) if n % 3 else (60, 60)
        Image.fromarray(np.full((*shape, 3), 8 * n, np.uint8)).save(source / f"{n:02d}.png")
        (source / f"{n:02d}.txt").write_text(f"{n % 2} of {n % 3}")
    words = ["--resolution", "32", "--buckets", "24x40", "32x32", "--val-fraction", "0.8"]
    assert tiny.call("make_shards", "pack", source, "--output", folder, *words) == 0
    return folder


def test_parts_say_which_places_they_are_of(pictures: Path) -> None:
    images = Images(ShardSet(pictures, "val"))
    seen = list(parts(images, range(len(images)), torch.device("cpu"), ""))
    assert len(seen) == 2 and [pixels.shape[2:] for _, pixels in seen] == [(24, 40), (32, 32)]
    found = [i for part, _ in seen for i in range(len(images))[part]]
    assert found == list(range(len(images)))
    for part, pixels in seen:
        assert all(torch.equal(images[i].data[0], one) for i, one in zip(range(len(images))[part], pixels, strict=True))


def test_captions_are_drawn_in_the_sizes_of_their_pictures(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = Images(ShardSet(pictures, "val"))
    names = ["0 of 0", "1 of 1", "0 of 0", "1 of 2"]
    assert sizes_of_captions(images, names) == [(32, 32), (24, 40), (32, 32), (24, 40)]
    drawn: list[tuple[Any, list[str]]] = []
    monkeypatch.setattr(generated, "draw_batches", lambda p, s, r, b: iter([drawn.append((p.size, r)) or (p.size, r)]))
    monkeypatch.setattr(generated, "replace", lambda pipeline, size: SimpleNamespace(size=size))
    pipeline, requests = SimpleNamespace(size=(8, 8)), ask(names, 1, 3)
    list(generated.draw_in_sizes(pipeline, None, requests, sizes_of_captions(images, names), 4))
    assert drawn == [((32, 32), [requests[0], requests[2]]), ((24, 40), [requests[1], requests[3]])]
    drawn.clear()
    list(generated.draw_in_sizes(pipeline, None, requests, [None] * 4, 4))
    assert drawn == [((8, 8), requests)]


def test_what_takes_one_size_is_named(pictures: Path) -> None:
    args = Namespace(data=pictures)
    assert len(held_out(args)) and held_out(args).sizes == [(24, 40), (32, 32)]
    with pytest.raises(UserError, match="--restore takes pictures of one size, and those of .* are in 2 buckets"):
        held_out(args, "--restore")
    alike = SimpleNamespace(sizes=[(24, 40)])
    assert of_one_size(alike, "--restore") is alike  # type: ignore[comparison-overlap, arg-type]
    check_crop(24, held_out(args))
    with pytest.raises(UserError, match="must lie in 1 to 24"):
        check_crop(25, held_out(args))
