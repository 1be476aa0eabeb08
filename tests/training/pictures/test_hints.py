"""Hints: edges and silhouettes of known pictures, and resizing that loses no line."""

from __future__ import annotations

import io
from itertools import product

import numpy as np
import pytest
from PIL import Image

from training.errors import UserError
from training.pictures import hints
from training.pictures.hints import HINTS, Depth, Edges, Hint, Mask, edges, hint_of

EDGES, MASK, DEPTH = Edges(), Mask(), Depth()


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_an_edge_is_the_darker_of_two_neighbours_that_differ_by_more_than_60() -> None:
    pixels = np.full((4, 5, 3), 100, np.uint8)
    assert not edges(pixels).any()
    pixels[1, 2] = (160, 100, 100)  # by 60: none
    assert not edges(pixels).any()
    pixels[1, 2] = (161, 100, 100)
    found = np.zeros((4, 5), np.uint8)
    found[[0, 2, 1, 1], [2, 2, 1, 3]] = 255  # its four neighbours, which are darker
    assert np.array_equal(edges(pixels), found)
    pixels[1, 2] = (39, 100, 100)  # itself is the darker one
    found = np.zeros((4, 5), np.uint8)
    found[1, 2] = 255
    assert np.array_equal(edges(pixels), found)
    apart = np.array([[[200, 0, 0], [0, 200, 0]]], np.uint8)  # of one sum: the first channel that differs
    assert edges(apart).tolist() == [[0, 255]] and edges(apart[:, ::-1]).tolist() == [[255, 0]]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_edges_turn_and_mirror_with_their_picture(channels: int) -> None:
    pixels = noise(channels, 9, 12, channels) // 3 * 2
    found = edges(pixels)
    assert 0 < (found == 255).sum() < found.size and set(np.unique(found)) == {0, 255}
    assert np.array_equal(edges(pixels[:, ::-1]), found[:, ::-1])
    assert np.array_equal(edges(pixels[::-1]), found[::-1])
    assert np.array_equal(edges(pixels.transpose(1, 0, 2)), found.T)


def test_the_outline_of_a_square_is_one_pixel_wide() -> None:
    pixels = np.full((12, 12, 1), 255, np.uint8)
    pixels[3:9, 3:9] = 0
    inner = np.zeros((12, 12), np.uint8)
    inner[3:9, 3:9] = 255
    inner[4:8, 4:8] = 0
    assert np.array_equal(edges(pixels), inner)
    assert (edges(255 - pixels) > 0).sum() == 4 * 6  # outside of a bright one, without the corners


def test_a_silhouette_by_alpha_and_by_the_border() -> None:
    pixels = np.full((8, 8, 3), 250, np.uint8)
    pixels[2:5, 3:6] = (250, 250, 200)
    pixels[0, 0] = 0  # a speck on the border does not change the background
    values, rule = MASK.made(pixels, None)
    wanted = np.zeros((8, 8, 1), np.uint8)
    wanted[2:5, 3:6] = wanted[0, 0] = 255
    assert rule == "background" and np.array_equal(values, wanted)
    near = pixels.copy()
    near[2:5, 3:6] = 230  # by 20: background still
    assert MASK.made(near, None).values.sum() == 255
    alpha = np.zeros((8, 8), np.uint8)
    alpha[1, 1:4] = 127, 128, 255
    values, rule = MASK.made(pixels, alpha)
    assert rule == "alpha" and np.array_equal(np.argwhere(values[..., 0]), [[1, 2], [1, 3]])


def test_a_photograph_has_no_silhouette() -> None:
    with pytest.raises(UserError, match="neither transparency nor an even background") as caught:
        MASK.made(noise(0, 16, 16, 3), None)
    assert "--hint-files" in caught.value.hint


@pytest.mark.parametrize("hint", [EDGES, MASK], ids=lambda hint: hint.kind)
def test_a_line_of_one_pixel_outlives_every_factor(hint: Hint) -> None:
    """And is one pixel wide: each pixel of the hint is of one pixel of what it becomes."""
    for side, at in product((8, 11, 16, 17, 31, 40, 63, 64), (0, 3, 7)):
        line = np.zeros((side, side, 1), np.uint8)
        line[:, at] = 255
        small = hint.resized(line, (8, 8))
        assert small.shape == (8, 8, 1) and np.array_equal(small[0], small[-1])
        assert np.flatnonzero(small[0]).tolist() == [at * 8 // side], (side, at)
        turned = hint.resized(line.transpose(1, 0, 2), (8, 8))
        assert np.array_equal(turned, small.transpose(1, 0, 2))


def test_the_greatest_of_each_block_and_the_mean() -> None:
    values = noise(1, 12, 8, 1)
    blocks = values.reshape(4, 3, 4, 2, 1)
    assert np.array_equal(EDGES.resized(values, (4, 4)), blocks.max((1, 3)))
    assert abs(DEPTH.resized(values, (4, 4)) - blocks.mean((1, 3))).max() <= 1  # each way rounded
    assert EDGES.resized(values, (12, 8)) is values
    part = EDGES.resized(values, (3, 2), (2, 3, 6, 12))
    assert np.array_equal(part, values[3:, 2:6].reshape(3, 3, 2, 2, 1).max((1, 3)))


def test_larger_hints_repeat_their_pixels() -> None:
    values = noise(2, 3, 4, 1)
    wanted = values.repeat(2, 0).repeat(2, 1)
    assert np.array_equal(EDGES.resized(values, (6, 8)), wanted)
    assert np.array_equal(DEPTH.resized(values, (6, 8)), wanted)


@pytest.mark.parametrize("hint", HINTS, ids=lambda hint: hint.kind)
def test_stored_and_loaded(hint: type[Hint]) -> None:
    values = noise(3, 6, 5, hint.channels)
    data = hints.stored(values)
    assert np.array_equal(hints.loaded(data, hint.channels, (6, 5)), values.transpose(2, 0, 1))
    with pytest.raises(UserError, match="another size or other channels"):
        hints.loaded(data, hint.channels, (5, 6))
    with pytest.raises(UserError, match="another size or other channels"):
        hints.loaded(data, 4 - hint.channels, (6, 5))
    with pytest.raises(UserError, match="cannot be read"):
        hints.loaded(data[:40], hint.channels, (6, 5))


def file(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_files_of_any_depth_and_channels() -> None:
    grey = noise(4, 5, 6)
    assert np.array_equal(EDGES.decoded(file(Image.fromarray(grey)))[0][..., 0], grey)
    assert np.array_equal(EDGES.decoded(file(Image.fromarray(grey).convert("RGB")))[0][..., 0], grey)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(DEPTH.decoded(file(deep))[0][..., 0], grey)
    assert DEPTH.decoded(file(deep), limits=(0, 257))[0].tolist() == (np.minimum(grey[..., None], 1) * 255).tolist()
    clear = Image.merge("LA", [Image.new("L", (6, 5), 255), Image.fromarray(grey)])
    values, notes, wide = EDGES.decoded(file(clear))
    assert abs(values[..., 0].astype(int) - grey).max() <= 1 and notes[0][1].startswith("hint: transparency")
    assert not wide and DEPTH.decoded(file(deep)).deep
    notes = DEPTH.decoded(file(deep), limits=(0, 257)).notes
    assert notes == [("cut", "hint: brightness outside of the range of hints")]
    colour = Image.fromarray(noise(5, 5, 6, 3))
    assert hint_of("picture").decoded(file(colour))[0].shape == (5, 6, 3)
    with pytest.raises(UserError, match="colour in a hint of depth"):
        DEPTH.decoded(file(colour))
    with pytest.raises(UserError, match="not an image"):
        DEPTH.decoded(b"depth")
    with pytest.raises(UserError, match="must be one of edges, mask, depth, picture"):
        hint_of("canny")


@pytest.mark.parametrize("kind", ["depth", "picture"])
def test_kinds_of_files_alone(kind: str) -> None:
    with pytest.raises(UserError, match=f"no {kind} is made of pixels") as caught:
        hint_of(kind).made(noise(6, 4, 4, 3), None)
    assert "--hint-files DIR" in caught.value.hint
