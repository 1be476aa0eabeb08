"""Dynamic thresholding: the numbers of its formula, each sample by itself, both ends of the same x_t."""

from __future__ import annotations

import pytest
import torch

from ldm.exact import F64, Isotropic, Smooth, scalar
from ldm.grids import Uniform
from ldm.noise import Noise
from ldm.samplers import DDIM, prior, sample
from ldm.schedules import VP, DDPMLinear, Flow, NoiseSchedule
from ldm.thresholding import USUAL, Thresholded, bound, thresholded

RAMP = torch.linspace(-3, 3, 61, dtype=F64)[None]
FIVE = torch.tensor([[-0.5, 0.2, 0.9, 1.4, -2.0]], dtype=F64)


@pytest.mark.parametrize(("quantile", "s", "of_1_5", "std"),
                         [(0.9, 2.7, 0.555556, 0.640342), (0.95, 2.9, 0.517241, 0.605234), (0.995, 3.0, 0.5, 0.586894)])
def test_a_ramp_is_clipped_and_scaled(quantile: float, s: float, of_1_5: float, std: float) -> None:
    assert bound(RAMP, quantile).item() == pytest.approx(s, abs=1e-9)
    made = thresholded(RAMP, quantile)[0]
    assert made[45].item() == pytest.approx(of_1_5, abs=1e-6) and RAMP[0, 45].item() == pytest.approx(1.5)
    assert made.std(correction=0).item() == pytest.approx(std, abs=1e-6)
    assert made.abs().max().item() == 1


@pytest.mark.parametrize(("quantile", "s"), [(0.5, 1), (0.8, 1.52), (0.9, 1.76), (0.95, 1.88), (1, 2), (1e-9, 1)])
def test_quantiles_are_linear_between_order_statistics(quantile: float, s: float) -> None:
    assert bound(FIVE, quantile).item() == pytest.approx(s, abs=1e-9)
    torch.testing.assert_close(thresholded(FIVE, quantile), FIVE.clamp(-s, s) / s)


def test_a_bound_is_the_quantile_of_torch_for_any_number_of_pixels() -> None:
    for count in (1, 2, 3, 10, 77):
        x = 2 * Noise.from_seeds([1, 2]).normal((1, count, 1), str(count), dtype=F64)
        for quantile in (0.3, 0.5, 0.995):
            wanted = x.abs().flatten(1).quantile(quantile, dim=1).clamp(min=1).view(2, 1, 1, 1)
            torch.testing.assert_close(bound(x, quantile), wanted)


def test_what_lies_in_range_stays_bit_for_bit() -> None:
    inside = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(thresholded(inside, USUAL), inside)


def test_each_sample_goes_by_its_own_pixels() -> None:
    both = torch.cat([FIVE, RAMP[:, :5] * 4])
    torch.testing.assert_close(thresholded(both, 0.9)[:1], thresholded(FIVE, 0.9), rtol=0, atol=0)


@pytest.mark.parametrize("schedule", [VP(), Flow(), DDPMLinear()], ids=repr)
def test_both_ends_make_up_the_same_x(schedule: NoiseSchedule) -> None:
    x, t = 3 * Noise.from_seeds([1, 2]).normal((2, 3, 4), dtype=F64), scalar(0.3)
    ends, (alpha, sigma) = Thresholded(Isotropic(schedule, std=2.0), 0.8)(x, t), schedule(t)
    torch.testing.assert_close(alpha * ends.x0 + sigma * ends.eps, x)
    assert ends.x0.abs().max() == 1
    free = Isotropic(schedule, std=2.0)(x, t).x0
    assert free.abs().max() > 1.2 and not torch.equal(free, ends.x0)


def test_a_drawing_ends_in_range() -> None:
    noise, schedule = Noise.from_seeds([1, 2]), Flow()
    wide = Isotropic(schedule, std=3.0)
    x, grid = prior(schedule, (3, 8, 8), noise, F64), Uniform()(12, schedule)
    assert sample(DDIM(), wide, x, grid, noise).abs().max() > 3
    assert sample(DDIM(), Thresholded(wide), x, grid, noise).abs().max() <= 1 + 1e-9


@pytest.mark.parametrize("quantile", [0.0, -0.5, 1.01])
def test_a_quantile_lies_between_none_and_all(quantile: float) -> None:
    with pytest.raises(ValueError, match="dynamic_threshold"):
        Thresholded(Smooth(Flow()), quantile)
