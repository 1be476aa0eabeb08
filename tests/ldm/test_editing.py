"""Editing: what is known stays, windows agree with the whole, and pixels outside a mask are the source's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.diffusion import Denoised
from ldm.editing import Known, Windows, adain, composite, filled, hole_in_latents
from ldm.exact import F64, Counted, Isotropic, Smooth, scalar
from ldm.grids import Uniform
from ldm.noise import Noise
from ldm.samplers import SAMPLERS, Sampler, prior, sample
from ldm.schedules import EDM, VP, DDPMLinear, Flow, NoiseSchedule

SHAPE = (2, 3, 4)
KNOWN = Noise.from_seeds([5, 6]).normal(SHAPE, "known", dtype=F64)
HOLE = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
HOLE[..., 1:, 2:] = True
processes = pytest.mark.parametrize("schedule", [VP(), EDM(), Flow(), DDPMLinear()], ids=repr)


def walked(sampler: Sampler, denoise: Known | Isotropic | Smooth | Windows, shape: tuple[int, ...] = SHAPE,
           steps: int = 12) -> Tensor:
    noise = Noise.from_seeds([1, 2])
    schedule = denoise.schedule
    return sample(sampler, denoise, prior(schedule, shape, noise, F64), Uniform()(steps, schedule), noise)


@processes
@pytest.mark.parametrize("kind", SAMPLERS, ids=lambda kind: kind.__name__)
def test_every_sampler_ends_on_what_is_known(kind: type[Sampler], schedule: NoiseSchedule) -> None:
    """And fills the hole; a hole everywhere is no mask at all, bit for bit."""
    known = walked(kind(), Known(Smooth(schedule), HOLE, KNOWN))
    torch.testing.assert_close(known[~HOLE.expand_as(known)], KNOWN[~HOLE.expand_as(known)], rtol=0, atol=1e-6)
    assert known.isfinite().all()
    everywhere = Known(Smooth(schedule), torch.ones_like(HOLE), KNOWN)
    assert torch.equal(walked(kind(), everywhere), walked(kind(), Smooth(schedule)))


@processes
def test_a_known_pair_makes_up_the_same_x(schedule: NoiseSchedule) -> None:
    x, t = Noise.from_seeds([1, 2]).normal(SHAPE, dtype=F64), scalar(0.4)
    ends, (alpha, sigma) = Known(Smooth(schedule), HOLE, KNOWN[:1])(x, t), schedule(t)
    torch.testing.assert_close(alpha * ends.x0 + sigma * ends.eps, x)
    assert torch.equal(torch.where(HOLE, Smooth(schedule)(x, t).x0, KNOWN[:1]), ends.x0)


class Mean(Smooth):
    """Answers the mean of all it sees, and a learned variance: what a window says depends on where it lies."""

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        (alpha, sigma), x0 = self.schedule(t), x.mean((-2, -1), keepdim=True).expand_as(x)
        return Denoised(x0, (x - alpha * x0) / sigma, x0 + 1)


@processes
@pytest.mark.parametrize(("size", "stride"), [((2, 3), 1), ((3, 2), 2), ((2, 9), 2), ((9, 4), 3)])
def test_windows_of_independent_pixels_are_the_whole_picture(
    schedule: NoiseSchedule, size: tuple[int, int], stride: int
) -> None:
    x, t, oracle = Noise.from_seeds([1, 2]).normal((2, 5, 7), dtype=F64), scalar(0.4), Isotropic(schedule)
    for got, wanted in zip(Windows(oracle, size, stride)(x, t)[:2], oracle(x, t)[:2], strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(3, 4), (8, 4), (3, 5), (9, 9)])
def test_one_window_is_none_bit_for_bit(size: tuple[int, int]) -> None:
    counted = Counted(Smooth(VP()))
    assert torch.equal(walked(SAMPLERS[0](), Windows(counted, size, 1)), walked(SAMPLERS[0](), Smooth(VP())))
    assert len(counted.times) == 12


def test_windows_are_averaged_by_their_tents() -> None:
    """Six latents in windows of four, every three: from 0 and, at the border, from 2; the weights are 1, 2, 2, 1."""
    x, t = torch.arange(6, dtype=F64).view(1, 1, 1, 6) ** 2, scalar(0.3)
    got, (alpha, sigma) = Windows(Mean(Flow()), (3, 4), 3)(x, t), Flow()(t)
    first, second = 14 / 4, 54 / 4
    wanted = torch.tensor([first, first, (2 * first + second) / 3, (first + 2 * second) / 3, second, second], dtype=F64)
    torch.testing.assert_close(got.x0.flatten(), wanted)
    torch.testing.assert_close(alpha * got.x0 + sigma * got.eps, x)
    assert got.log_var_frac is not None
    torch.testing.assert_close(got.log_var_frac.flatten(), wanted + 1)


def test_windows_cover_every_latent_and_call_once_each() -> None:
    for side in range(5, 12):
        counted = Counted(Isotropic(Flow()))
        assert Windows(counted, (4, 4), 3)(torch.ones(1, 1, side, 4, dtype=F64), scalar(0.5)).x0.isfinite().all()
        assert len(counted.times) == -(-(side - 4) // 3) + 1
    for stride in (0, 5):
        with pytest.raises(ValueError, match="stride"):
            Windows(Smooth(Flow()), (4, 4), stride)


def mask(*pixels: tuple[int, int], size: tuple[int, int] = (8, 12)) -> Tensor:
    hole = torch.zeros(1, 1, *size, dtype=torch.bool)
    for row, column in pixels:
        hole[..., row, column] = True
    return hole


def test_one_pixel_opens_its_latent_and_those_around() -> None:
    assert hole_in_latents(mask((7, 4)), 4).nonzero()[:, 2:].tolist() == [[1, 1]]
    assert hole_in_latents(mask((7, 4)), 4, dilate=1).nonzero()[:, 2:].tolist() == [[r, c] for r in (0, 1)
                                                                                 for c in (0, 1, 2)]
    assert hole_in_latents(mask((0, 0), (7, 11)), 2, dilate=1).sum() == 8
    assert not hole_in_latents(mask(), 4, dilate=2).any()
    with pytest.raises(ValueError, match="factor 8"):
        hole_in_latents(mask(), 8)
    for wrong in (mask().float(), mask()[0], mask().expand(1, 3, 8, 12)):
        with pytest.raises(ValueError, match="mask is bool"):
            hole_in_latents(wrong, 4)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.97])
def test_a_hole_is_filled_with_the_nearest_pixel_outside(share: float) -> None:
    """By the squared distance to every seen pixel; the numbers of a picture are all different."""
    hole = Noise.from_seeds([1, 2]).uniform((1, 9, 7)) < share
    images = torch.arange(2 * 3 * 63, dtype=torch.float32).view(2, 3, 9, 7)
    got = filled(images, hole)
    place = torch.cartesian_prod(torch.arange(9.0), torch.arange(7.0))
    distance = (place[:, None] - place).square().sum(-1)
    for index in (0, 1):
        seen = ~hole[index, 0].flatten()
        taken = (got[index, 0] - images[index, 0, 0, 0]).flatten().long()
        assert seen[taken].all() and torch.equal(taken[seen], torch.arange(63)[seen])
        nearest = distance.masked_fill(~seen, torch.inf).min(1).values
        assert torch.equal(distance[torch.arange(63), taken], nearest)
        assert torch.equal(got[index] - images[index], (got[index, 0] - images[index, 0]).expand(3, -1, -1))


@pytest.mark.parametrize("how", ["grey", "nearest"])
def test_nothing_of_a_hole_is_left(how: str) -> None:
    hole, images = mask((2, 3), (2, 4), (7, 11)), Noise.from_seeds([3]).normal((3, 8, 12))
    other = torch.where(hole, torch.full_like(images, torch.nan), images)
    assert torch.equal(filled(images, hole, how), filled(other, hole, how))  # type: ignore[arg-type]
    assert torch.equal(filled(images, hole, how).where(~hole, images), images)  # type: ignore[arg-type]


def test_what_cannot_be_filled_is_refused() -> None:
    images = torch.zeros(1, 3, 8, 12)
    assert torch.equal(filled(images + 1, ~mask(), "grey"), images)
    with pytest.raises(ValueError, match="grey"):
        filled(images, ~mask())
    with pytest.raises(ValueError, match="'telea'"):
        filled(images, mask(), "telea")  # type: ignore[arg-type]


def pictures() -> tuple[Tensor, Tensor]:
    made, source = (Noise.from_seeds([1, 2]).uniform((3, 16, 12), key) * 256 for key in ("made", "source"))
    return made.to(torch.uint8), source.to(torch.uint8)


@pytest.mark.parametrize("feather", [0, 1, 3, 30])
def test_pixels_outside_are_the_source_bit_for_bit(feather: int) -> None:
    (made, source), hole = pictures(), mask((3, 4), (3, 5), (4, 4), size=(16, 12))
    got = composite(made, source, hole, feather)
    rows, columns = torch.arange(16.0)[:, None], torch.arange(12.0)
    distance = torch.stack([(rows - r) ** 2 + (columns - c) ** 2 for r, c in ((3, 4), (3, 5), (4, 4))]).amin(0).sqrt()
    outside = (distance >= feather + 1).expand_as(got)
    assert torch.equal(got[outside], source[outside])
    assert torch.equal(got[hole.expand_as(got)], made[hole.expand_as(got)])
    assert torch.equal(composite(made, source, mask(size=(16, 12)), feather), source)
    assert torch.equal(composite(made, source, ~mask(size=(16, 12)), feather), made)


def test_a_feather_falls_smoothly_around_the_hole() -> None:
    hole, source = mask((0, 0), size=(1, 6)), torch.zeros(1, 1, 1, 6, dtype=torch.uint8)
    assert composite(source + 200, source, hole, 3).flatten().tolist() == [200, 169, 100, 31, 0, 0]
    assert composite(source + 200, source, hole, 1).flatten().tolist() == [200, 100, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="uint8"):
        composite(source.float(), source, hole)
    with pytest.raises(ValueError, match="feather"):
        composite(source, source, hole, -1)


def test_adain_takes_mean_and_deviation_of_the_style() -> None:
    content, style = Noise.from_seeds([1, 2]).normal((4, 5, 6), dtype=F64), 3 * KNOWN.repeat(1, 2, 1, 1) + 1
    got = adain(content, style)
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(got, dim=(2, 3)), statistic(style, dim=(2, 3)), rtol=0, atol=1e-6)
    torch.testing.assert_close(adain(content, content), content, rtol=0, atol=1e-6)
    assert torch.equal(adain(content[:1], style[:1]), got[:1])
    torch.testing.assert_close(adain(torch.ones_like(content), style)[:, :, 0, 0], style.mean((2, 3)))
