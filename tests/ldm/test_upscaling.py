"""Upscaling: what the backbone is shown, any size in and its multiple out, windows, and truth to the small picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoencoder.identity import Identity
from autoencoder.images import to_uint8, to_unit
from autoencoder.kl import KL
from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.grids import Uniform
from ldm.guidance import ClassifierFree
from ldm.image_conditions import NoImage
from ldm.image_conditions.low_res import LowRes
from ldm.inverse.operators import Box
from ldm.noise import Noise
from ldm.pipeline import Pipeline, Sampling
from ldm.predictions import X0
from ldm.samplers import DDIM
from ldm.schedules import Flow
from ldm.upscaling import canvas, larger, projected, reflected, residual, upscaling

STD, LOW = 0.05, LowRes(factor=4, augment=0.5, level=0.0)
SEEN: list[tuple[int, ...]] = []


class Backbone(nn.Module):
    """x0 of data N(the picture it is shown, STD^2) on `flow`: the exact posterior of such data."""

    def __init__(self, multiple: int = 1) -> None:
        super().__init__()
        self.multiple = multiple

    def forward(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        assert cond.image is not None and cond.image.shape[-2:] == x.shape[-2:]
        SEEN.append(tuple(x.shape))
        t, mean = (level / 1000).to(x.dtype).view(-1, 1, 1, 1), cond.image[:, :1].expand_as(x)
        if x.shape[1] == cond.image.shape[1]:
            mean = cond.image
        return mean + (x - (1 - t) * mean) * (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)


def text(captions: Sequence[str]) -> Cond:
    return Cond(torch.zeros(len(captions), 1, 1), torch.ones(len(captions), 1, dtype=torch.bool))


def pipeline(pixels: bool = True, multiple: int = 1, steps: int = 6, size: tuple[int, int] = (32, 32)) -> Pipeline:
    torch.manual_seed(0)
    shape: Any = Identity() if pixels else KL(channels=(8, 8, 8), blocks=1, latent_channels=4, groups=4)
    denoiser = Denoiser(Backbone(multiple), Diffusion(schedule=Flow(), prediction=X0()))
    plan = Sampling(sampler=DDIM(), grid=Uniform(), guidance=ClassifierFree(scale=1.0), steps=steps)
    SEEN.clear()
    return Pipeline(shape.build().eval(), denoiser, text, plan, size, image=LOW)  # type: ignore[arg-type]


def picture(height: int = 8, width: int = 8, count: int = 1) -> Tensor:
    return torch.randint(90, 166, (count, 3, height, width), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(height * width))


def drawn(pipe: Pipeline, small: Tensor, count: int = 1, seed: int = 7, **how: Any) -> Tensor:
    return torch.cat(list(pipe.pixels([""] * count, seed, task=upscaling(pipe, small, **how))))


@pytest.mark.parametrize("pixels", [True, False], ids=["pixels", "latents"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 3), (1, 1), (11, 8), (13, 21)])
def test_any_size_goes_in_and_four_times_as_much_comes_out(pixels: bool, height: int, width: int) -> None:
    pipe, small = pipeline(pixels, multiple=2), picture(height, width)
    whole = larger(pipe, None, (height, width))
    made = drawn(whole, small)
    assert made.shape == (1, 3, 4 * height, 4 * width)
    window = pipe.latent_shape(pipe.size)[1:]
    assert {shape[-2:] for shape in SEEN} == {tuple(window)} and (whole is pipe) == (max(height, width) <= 8)


def test_the_backbone_is_shown_the_enlarged_picture() -> None:
    """Each its own, in its batch; of a tiny STD what is drawn is what was shown."""
    pipe, small = pipeline(steps=60), picture(count=3)
    made = drawn(pipe, small, count=3)
    wanted = to_uint8(LOW.shown(to_unit(small), (32, 32), torch.zeros(3), Noise.from_seeds([0, 1, 2]))["image"])
    off = (made.float() - wanted.float()).flatten(1)
    assert off.mean(1).abs().max() < 1 and off.std(1).max() < 3 * STD * 127.5
    alone = drawn(pipe, small[1:2], seed=8)
    assert torch.equal(alone[0], made[1])


def test_a_level_is_noise_of_the_seed_and_is_told() -> None:
    pipe, small, told = replace(pipeline(), image=LowRes(factor=4, augment=1.0, level=0.3)), picture(), []

    def extras(level: float | None, seed: int = 7) -> tuple[Tensor, Tensor]:
        shown = upscaling(pipe, small, level=level)(slice(0, 1)).extras
        assert shown is not None
        found = shown(Noise.from_seeds([seed]))
        return found["image"], found["image_level"]

    for level, u in ((None, 0.3), (0.0, 0.0), (0.8, 0.8)):
        told.append(extras(level)[0])
        assert extras(level)[1].tolist() == pytest.approx([u])
    assert torch.equal(told[1], extras(0.0, 8)[0]) and not torch.equal(told[0], extras(None, 8)[0])
    assert torch.equal(told[0], extras(0.3)[0]) and not torch.equal(told[0], told[2])
    for level in (-0.1, 1.1):
        with pytest.raises(ValueError, match="must lie in"):
            upscaling(pipe, small, level=level)
    with pytest.raises(ValueError, match=r"must lie in \[0, 0.5\], which this model was trained with, got 0.6"):
        upscaling(pipeline(), small, level=0.6)


@pytest.mark.parametrize("pixels", [True, False], ids=["pixels", "latents"])
def test_one_tile_is_the_whole_bit_for_bit(pixels: bool) -> None:
    pipe, small = pipeline(pixels), picture(8, 8)
    tiled = larger(pipe, 3, (9, 9))
    assert tiled is not pipe and torch.equal(drawn(tiled, small), drawn(pipe, small))


def test_tiles_of_what_is_known_pixel_by_pixel_are_the_whole() -> None:
    """The posterior of independent pixels does not depend on the windows."""
    pipe, small = pipeline(), picture(20, 13)
    whole, tiled = drawn(larger(pipe, 0, (20, 13)), small), drawn(larger(pipe, None, (20, 13)), small)
    assert (whole.int() - tiled.int()).abs().max() <= 1 and {s[-2:] for s in SEEN} == {(80, 52), (32, 32)}


def test_a_consistent_picture_has_the_means_of_the_small_one() -> None:
    """In pixels every step is brought to it, elsewhere the end; what is cut off counts for nothing."""
    for pixels in (True, False):
        pipe, small = pipeline(pixels), picture(7, 9)
        pipe = larger(pipe, None, (7, 9))
        free, bound = drawn(pipe, small), drawn(pipe, small, consistent=True)
        assert residual(bound, small, 4).item() < 1e-4 < 0.5 < residual(free, small, 4).item()


def test_a_projection_moves_as_little_as_it_can() -> None:
    small, made = picture(3, 5, 2), picture(12, 20, 2)
    got = projected(made, small, 4)
    means = Box(factor=4)(got.double())
    assert torch.equal(means, small.double())
    off = to_unit(got) - to_unit(made)
    blocks = off.unfold(2, 4, 4).unfold(3, 4, 4).flatten(-2)
    assert blocks.std(-1).max() < 0.008 < off.abs().max()  # the same step for every pixel of a square
    assert torch.equal(projected(got, small, 4), got)


def test_a_projection_reaches_what_clipping_moved() -> None:
    """Pixels at the end of the range cannot follow: the others of their square go further."""
    for shade in (0, 255):
        flat = projected(torch.full((1, 3, 4, 4), 255 - shade, dtype=torch.uint8), picture(2, 2) * 0 + shade, 2)
        assert flat.eq(shade).all()
    noisy = torch.randint(0, 2, (1, 3, 12, 12), generator=torch.Generator().manual_seed(3)).to(torch.uint8) * 255
    assert residual(projected(noisy, picture(3, 3), 4), picture(3, 3), 4).item() == 0
    made = torch.tensor([[250, 255], [0, 100]], dtype=torch.uint8).expand(1, 3, 2, 2)
    got = projected(made, torch.full((1, 3, 1, 1), 220, dtype=torch.uint8), 2)
    assert got.double().mean((-2, -1)).eq(220).all() and got[..., 0, 1].eq(255).all()


def test_a_residual_is_in_255ths() -> None:
    small = torch.full((2, 3, 2, 2), 100, dtype=torch.uint8)
    made = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    made[1] = 103
    assert residual(made, small, 4).tolist() == pytest.approx([0, 3], abs=1e-4)


def test_a_picture_is_reflected_as_often_as_it_takes() -> None:
    row = torch.tensor([1, 2, 3], dtype=torch.uint8).view(1, 1, 1, 3)
    assert reflected(row, (2, 9)).tolist() == [[[[1, 2, 3, 2, 1, 2, 3, 2, 1]] * 2]]
    assert reflected(row[..., :1], (1, 3)).flatten().tolist() == [1, 1, 1]


def test_the_canvas_is_the_trained_one_or_what_the_multiple_divides() -> None:
    assert canvas(pipeline(multiple=2), (3, 11)) == (8, 11)
    assert canvas(pipeline(pixels=False, multiple=2), (3, 11)) == (8, 12)  # a multiple of 8 pixels
    assert canvas(pipeline(multiple=8), (9, 8)) == (10, 8)


def test_a_posterior_sample_has_twice_the_error_of_the_mean() -> None:
    """-3.0103 dB; the mean of eight regains all but 10 log10(1 + 1/8) = 0.5115 of them."""
    pipe, small = pipeline(steps=400, size=(64, 64)), picture(16, 16)
    shown = LOW.shown(to_unit(small), (64, 64), torch.zeros(1), Noise.from_seeds([0]))["image"]
    truth = shown + STD * Noise.from_seeds([99]).normal(shown.shape[1:], "truth")
    made = to_unit(drawn(pipe, small, count=8))

    def decibels(x: Tensor) -> float:
        return -10 * math.log10((x - truth).square().mean().item())

    singles = [decibels(made[k : k + 1]) for k in range(8)]
    assert sum(singles) / 8 - decibels(shown) == pytest.approx(-3.0103, abs=0.1)
    assert decibels(made.mean(0, keepdim=True)) - decibels(shown) == pytest.approx(-0.5115, abs=0.1)


def test_a_model_that_is_shown_no_small_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="image.kind none, and enlarges no pictures: give one of image.kind low-res"):
        upscaling(replace(pipeline(), image=NoImage()), picture())
