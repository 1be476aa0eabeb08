"""Edits of the embedded shapes: what is asked, what is judged, and the command that measures them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from training.errors import UserError
from training.measuring.edit_scores import coloured, seam
from training.measuring.editing import PARTS, bare, shapes_edits
from training.shapes.checker import check, overlap, silhouette
from training.shapes.edits import another_colour, another_object
from training.shapes.rendering import render
from training.shapes.scenes import HELD_OUT, Scene


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_another_object_differs_within_its_hole_alone(objects: int) -> None:
    """The target has a held-out pair, the source none; the hole covers what changes, and no other object."""
    for seed in range(12):
        edit = another_object(seed, objects)
        before, after, hole = edit.picture(32), render(edit.target, 32), edit.hole(32)
        pairs = [[(item.colour, item.shape) in HELD_OUT for item in one.objects] for one in (edit.source, edit.target)]
        assert not any(pairs[0]) and sum(pairs[1]) == 1 and pairs[1][edit.place]
        assert np.array_equal(before[~hole], after[~hole]) and not np.array_equal(before, after)
        for place, item in enumerate(edit.source.objects):
            own = silhouette(render(Scene((item,), edit.source.background), 32))
            assert (own <= hole).all() if place == edit.place else not (own & hole).any()
        for words in zip(edit.words, edit.fewest_words, strict=True):
            verdicts = [check(image, caption)["obeyed"] for image in (before, after) for caption in words]
            assert verdicts[:2] == [words == (edit.words[0], edit.fewest_words[0])] * 2
            assert verdicts[2:] == [words == (edit.words[1], edit.fewest_words[1])] * 2


def test_another_colour_is_one_word() -> None:
    for seed, objects in ((seed, objects) for seed in range(12) for objects in (1, 2)):
        edit = another_colour(seed, objects)
        for before, after in (edit.words, edit.fewest_words):
            changed = [pair for pair in zip(before.split(), after.split(), strict=True) if pair[0] != pair[1]]
            kept = edit.source.objects[edit.place], edit.target.objects[edit.place]
            assert [pair for pair in changed if pair[0] not in ("a", "an")] == [(kept[0].colour, kept[1].colour)]
        assert len(edit.fewest_words[0]) < len(edit.words[0])
        assert coloured(render(edit.target, 32), edit) and not coloured(edit.picture(32), edit)
        assert np.array_equal(silhouette(edit.picture(32)), silhouette(render(edit.target, 32)))


def test_a_hole_is_two_thirty_seconds_wider_than_its_object() -> None:
    edit = another_object(0, 1)
    item = edit.source.objects[0]
    for side in (32, 96):
        rows, columns = np.nonzero(edit.hole(side))
        for places, centre in ((rows, item.y), (columns, item.x)):
            low, high = ((centre + sign * (item.extent / 2 + 2 / 32)) * side for sign in (-1, 1))
            assert max(0, low) <= places.min() < max(0, low) + 1
            assert min(side, high) - 1 < places.max() + 1 <= min(side, high)


def test_overlap_is_the_intersection_over_the_union() -> None:
    a, b = np.zeros((2, 4, 4), dtype=bool)
    assert overlap(a, b) == 1
    a[:2], b[1:] = True, True
    assert overlap(a, b) == 4 / 16 and overlap(a, a) == 1 and overlap(a, ~a) == 0


def test_a_seam_is_compared_with_all_other_columns() -> None:
    """Steps of 1, 2, 10, 1, 0: the 95th percentile of all but the third is 1.85."""
    columns = torch.tensor([0, 1, 3, 13, 14, 14], dtype=torch.uint8)
    picture = columns.expand(3, 4, 6).clone()
    assert seam(picture, 3) == pytest.approx((10, 1.85))
    picture[:, 0] = 14 - picture[:, 0]  # the same steps downwards
    assert seam(picture, 3) == pytest.approx((10, 1.85)) and seam(picture, 1)[1] == pytest.approx(8.8)


def test_a_bare_caption_names_colour_and_shape() -> None:
    for said in ("an orange circle at the top left", "an orange circle in the centre", "an orange circle"):
        assert bare(said) == "an orange circle"


def test_every_part_is_measured_and_shown(denoiser: Path, tmp_path: Path) -> None:
    """Six steps of training edit nothing; edit-friendly inversion gives the reconstruction back all the same."""
    words = ("--edits", "shapes", "--count", 2, "--steps", 3, "--device", "cpu", "--seed", 5)
    where = ("--grid", tmp_path / "sheet.png", "--output", tmp_path / "out.json")
    assert tiny.call("evaluate", "--model", denoiser, *words, *where) == 0
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["edits"] == 2 and all(any(key.startswith(f"{part}_") for key in numbers) for part in PARTS)
    assert numbers["inversion_edit-friendly_largest_difference"] <= 1
    assert numbers["inversion_ddim_unguided_3_psnr"] > numbers["inversion_ddim_unguided_1_psnr"]
    assert numbers["inpainting_one_obeyed"] == 0 and len(numbers["inpainting_one_obeyed_95"]) == 2
    assert all(0 <= numbers[f"sdedit_{strength}_kept"] <= 1 for strength in (0.2, 0.4, 0.6, 0.8, 1))
    assert all(f"words_{said}_{how}_iou" in numbers for said in ("full", "short") for how in ("alone", "coupled"))
    for part in PARTS:
        assert Image.open(tmp_path / f"sheet-{part}.png").width > 100
    refused = tiny.refused("evaluate", "--model", denoiser, *words, "--grid", tmp_path / "sheet.png")
    assert "sheet-inpainting.png already exists" in refused.what


def test_edits_need_a_picture_each(denoiser: Path) -> None:
    problem = tiny.refused("evaluate", "--model", denoiser, "--edits", "shapes", "--count", 0, "--device", "cpu")
    assert "at least 1" in problem.what and problem.hint


def test_edits_need_square_colour_pictures() -> None:
    for channels, size in ((1, (32, 32)), (3, (32, 48)), (3, (24, 24))):
        model: Any = SimpleNamespace(autoencoder=SimpleNamespace(image_channels=channels), size=size)
        with pytest.raises(UserError, match=f"the model draws {size[1]}x{size[0]}"):
            shapes_edits(model, model, Namespace(count=1, grid=None))
