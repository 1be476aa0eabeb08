"""What the pictures show: every cell of a grid in its place, differences doubled, strips from noise to picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from autoencoder.fidelity import psnr, ssim
from autoencoder.images import to_uint8, to_unit
from ldm.samplers import Snapshot
from training.models.reconstructions import SHOWN, measure
from training.pictures import grids
from training.pictures.strips import MOST, Strip

SIDE = grids.SMALLEST  # of pictures that are not enlarged


def flat(*values: int) -> Tensor:
    """Pictures of one grey each, uint8 (B,3,SIDE,SIDE)."""
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, SIDE, SIDE)


def cells(sheet: Image.Image, columns: int, count: int, *, left: int = 0, below: int = 0) -> list[int]:
    """The red of the middle of each cell, in reading order; -1 where a cell is not of one colour."""
    pixels = np.asarray(sheet)[:, left:]
    found = []
    for i in range(count):
        y, x = i // columns * (SIDE + below + 4), i % columns * (SIDE + 4)
        cell = pixels[y : y + SIDE, x : x + SIDE]
        found.append(int(cell[0, 0, 0]) if (cell == cell[0, 0]).all() else -1)
    return found


def margin(sheet: Image.Image, columns: int) -> int:
    """How wide the labels beside the rows are."""
    return sheet.width - columns * (SIDE + 4)


def test_a_grid_is_in_reading_order() -> None:
    sheet = grids.grid(flat(10, 20, 30, 40, 50), 3)
    assert sheet.size == (3 * (SIDE + 4), 2 * (SIDE + 4))
    assert cells(sheet, 3, 6) == [10, 20, 30, 40, 50, 255]


def test_small_pictures_are_enlarged_evenly() -> None:
    """Each pixel becomes a square of 48: a picture of two by two keeps its corners."""
    small = torch.tensor([[0, 50], [100, 150]], dtype=torch.uint8).expand(1, 3, 2, 2)
    sheet = np.asarray(grids.grid(small, 1))[:SIDE, :SIDE, 0]
    assert np.array_equal(sheet, np.array([[0, 50], [100, 150]]).repeat(48, 0).repeat(48, 1))


def test_a_caption_stands_under_its_own_picture() -> None:
    sheet = np.asarray(grids.grid(flat(10, 20), 2, captions=["", "a word"]))
    under = [sheet[SIDE : sheet.shape[0], x : x + SIDE] for x in (0, SIDE + 4)]
    assert (under[0] == 255).all() and (under[1] < 128).any()


def test_a_contact_sheet_spreads_over_all_pictures() -> None:
    """64 of 190, the first and the last among them, in order; fewer are all shown."""
    every = grids.to_pil(flat(*range(190)))
    sheet = grids.contact_sheet(every, [""] * 190)
    assert cells(sheet, 8, 64, below=4) == [i * 3 for i in range(64)]
    assert cells(grids.contact_sheet(every[:5], [""] * 5), 3, 6, below=4) == [0, 1, 2, 3, 4, 255]
    with pytest.raises(ValueError, match="got 5 and 4"):
        grids.contact_sheet(every[:5], [""] * 4)


def test_a_contact_sheet_takes_pictures_of_any_kind_and_size() -> None:
    """Grey and transparent ones, which show the sheet's white; oblong ones keep their shape."""
    clear = Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 0))
    wide = Image.new("RGB", (4 * SIDE, 2 * SIDE), (50, 50, 50))
    sheet = np.asarray(grids.contact_sheet([Image.new("L", (SIDE, SIDE), 7), clear, wide], ["grey", "clear", "wide"]))
    side, middle = 2 * SIDE, SIDE
    assert (sheet[middle, middle] == 7).all() and (sheet[middle, side + 4 + middle] == 255).all()
    column = sheet[side + 4 + 17 :, middle, 0][:side]
    assert (column[: side // 4 - 1] == 255).all() and (column[side // 4 + 1 : 3 * side // 4 - 1] == 50).all()


def test_grey_and_transparent_pictures_keep_their_kind() -> None:
    """One channel is grey, four are RGBA; on a grid what is transparent is white."""
    grey, clear = flat(40)[:, :1], torch.zeros(1, 4, SIDE, SIDE, dtype=torch.uint8)
    clear[:, :, :, : SIDE // 2] = 255
    clear[:, 0] = 0
    assert [image.mode for image in (*grids.to_pil(grey), *grids.to_pil(clear))] == ["L", "RGBA"]
    assert cells(grids.grid(grey, 1), 1, 1) == [40]
    sheet = np.asarray(grids.grid(clear, 1))
    assert sheet[5, 5].tolist() == [0, 255, 255] and sheet[5, SIDE - 5].tolist() == [255, 255, 255]


def test_a_comparison_shows_twice_the_difference_of_the_last_two() -> None:
    """|60 - 10| x 2, |20 - 40| x 2, and what would be above 255."""
    rows = {"input": flat(1, 2, 3), "teacher": flat(10, 40, 0), "student": flat(60, 20, 200)}
    sheet = grids.comparison(rows)
    assert cells(sheet, 3, 12, left=margin(sheet, 3)) == [1, 2, 3, 10, 40, 0, 60, 20, 200, 100, 40, 255]


class Halved(torch.nn.Module):
    """An autoencoder whose reconstruction is half as bright."""

    quantize = None

    def forward(self, images: Tensor, noise: None) -> tuple[Tensor, Tensor]:
        assert noise is None
        return to_unit(to_uint8(images) // 2), images


def distance(ours: Tensor, images: Tensor) -> Tensor:
    """Takes the place of LPIPS: how much darker the first is, in 255."""
    ours, images = (to_uint8(x) if x.is_floating_point() else x for x in (ours, images))
    return (images.float() - ours.float()).mean((1, 2, 3))


def test_reconstructions_are_shown_beneath_their_inputs(tmp_path: Path) -> None:
    """The first eight of the first batch, and the error; the numbers are means over all pictures of all batches."""
    values, last = tuple(range(10, 110, 10)), (200, 200)
    batches = (flat(*part) for part in (values, last))
    numbers = measure(Halved(), distance, batches, tmp_path)  # type: ignore[arg-type]
    every = flat(*values, *last)
    wanted = {"psnr": psnr(every // 2, every), "ssim": ssim(every // 2, every), "lpips": distance(every // 2, every)}
    assert numbers == pytest.approx({name: found.mean().item() for name, found in wanted.items()}, rel=1e-5)
    with Image.open(tmp_path / "grid.png") as sheet:
        found = cells(sheet, SHOWN, 3 * SHOWN, left=margin(sheet, SHOWN))
    shown = list(values[:SHOWN])
    assert found == [*shown, *(value // 2 for value in shown), *shown]  # twice half of each


def strip(steps: int, shown: int) -> Strip:
    """Fed every step of a sampler: step n has x_t of n / 50 and x0 of -n / 50; the second sample is 1 throughout."""
    made = Strip(SimpleNamespace(decode=lambda latents: latents), shown)  # type: ignore[arg-type]
    for n in range(steps):
        x = torch.full((2, 3, SIDE, SIDE), n / 50)
        x[1] = 1.0
        made(Snapshot(n, 1 - n / steps, x, -x, n + 1))
    return made


def test_facts_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    """As other programs read it, which know no Infinity; sealed as it is read."""
    path = tmp_path / "one.png"
    grids.save(Image.new("RGB", (4, 4)), path, {"scale": float("inf"), "settings": {"eta": float("nan")}, "seed": 1})
    assert "Infinity" not in Image.open(path).text["ldm"] and "NaN" not in Image.open(path).text["ldm"]  # type: ignore[attr-defined]
    told = grids.facts(path)
    assert told.pop("sha256") and grids.changed(path) is False
    assert told == {"scale": None, "scale_is": "inf", "settings": {"eta": None, "eta_is": "nan"}, "seed": 1}


def steps_shown(made: Strip, steps: int) -> list[int]:
    return [round((1 - t) * steps) for t in made.rows[2]]


def test_a_strip_shows_steps_evenly_and_the_last_among_them() -> None:
    assert steps_shown(strip(20, 8), 20) == [2, 4, 7, 9, 12, 14, 17, 19]
    assert steps_shown(strip(3, 8), 3) == [0, 1, 2] and steps_shown(strip(16, 4), 16) == [3, 7, 11, 15]


def test_a_strip_of_many_steps_keeps_few_of_them() -> None:
    made = strip(2410, 8)
    assert len(made.shots) <= MOST and steps_shown(made, 2410)[-1] == 2409
    gaps = [b - a for a, b in pairwise(steps_shown(made, 2410))]
    assert max(gaps) <= 1.5 * min(gaps)


def test_a_strip_shows_x_t_above_x0_as_time_falls() -> None:
    """Of the sample that is asked for."""
    made = strip(16, 4)
    moving = [to_uint8(torch.tensor(sign * n / 50)).item() for sign in (1, -1) for n in (3, 7, 11, 15)]
    for index, rows in ((0, moving), (1, [255] * 4 + [0] * 4)):
        sheet = made.draw(index)
        below = sheet.height // 2 - SIDE - 4
        assert cells(sheet, 4, 8, left=margin(sheet, 4), below=below) == rows


def test_a_strip_shows_growing_variance_at_the_scale_of_the_others() -> None:
    """x of standard deviation 40 is divided by it; x0 is not, nor is x of a smaller one."""
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    x = x / x.std()
    for scale, divisor in ((40.0, 40.0), (0.5, 1.0)):
        made = Strip(SimpleNamespace(decode=lambda latents: latents), 1)  # type: ignore[arg-type]
        made(Snapshot(0, 1.0, scale * x, x / 4, 1))
        (noisy,), (clean,), _ = made.rows
        assert (noisy.int() - to_uint8(scale * x / divisor).int()).abs().max() <= 1
        assert torch.equal(clean, to_uint8(x / 4))
