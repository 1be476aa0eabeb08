"""Which pictures and captions an evaluation compares: each caption equally often, as many as asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from training.measuring.held_out import even_captions, even_indices
from training.models.reconstructions import center

NAMES = ("b", "a", "a", "b", "a", "c", "a", "b", "b")  # four of a and b, one of c


def images(names: tuple[str, ...] = NAMES) -> object:
    shards = SimpleNamespace(read_field=lambda i, field: names[i].encode())
    return type("Packed", (list,), {"shards": shards})(names)


@pytest.mark.parametrize(
    ("count", "places"),
    [
        (1, [5]),  # by their hashes the captions are c, b, a
        (3, [0, 1, 5]),
        (4, [0, 1, 3, 5]),  # one of each before a second of any
        (5, [0, 1, 2, 3, 5]),
        (7, [0, 1, 2, 3, 4, 5, 7]),
        (8, [0, 1, 2, 3, 4, 5, 7, 8]),
        (9, list(range(9))),
        (12, list(range(9))),
    ],
)
def test_as_many_pictures_as_asked_for_each_caption_as_often_as_it_can(count: int, places: list[int]) -> None:
    """In the order in which they are stored."""
    assert even_indices(images(), count) == places  # type: ignore[arg-type]


def test_captions_in_turn() -> None:
    assert even_captions(images(), 5) == ["c", "b", "a", "c", "b"]  # type: ignore[arg-type]
    assert even_captions(images(("z", "z")), 3) == ["z", "z", "z"]  # type: ignore[arg-type]


def test_the_first_captions_are_no_kind_of_their_own() -> None:
    """Of more captions than are asked for, not those that begin with the first letters of the alphabet."""
    names = tuple(f"{letter} {number:03}" for letter in "abcd" for number in range(100))
    for chosen in (even_captions(images(names), 80), [names[i] for i in even_indices(images(names), 80)]):  # type: ignore[arg-type]
        assert len(set(chosen)) == 80
        assert all(10 <= sum(name.startswith(letter) for name in chosen) <= 30 for letter in "abcd")


def test_a_crop_is_central() -> None:
    pixels = torch.arange(36).view(1, 1, 6, 6)
    assert center(pixels, 2).flatten().tolist() == [14, 15, 20, 21]
    assert center(pixels, 0) is pixels and torch.equal(center(pixels, 6), pixels)
