from __future__ import annotations

import math

import pytest
import torch

from ldm.exact import F64, Isotropic, gaussian, two_modes
from ldm.grids import Karras, Uniform, UniformLogSNR
from ldm.likelihood import bits_per_dim, log_likelihood
from ldm.noise import Noise
from ldm.schedules import EDM, GVP, VE, VP, DDPMLinear, Flow, NoiseSchedule


@pytest.mark.parametrize("schedule", [VE(), VP(), Flow(), GVP(), EDM(), DDPMLinear()], ids=repr)
def test_a_gaussian_has_its_own_density(schedule: NoiseSchedule) -> None:
    x = torch.tensor([[0.0], [0.5], [-1.7]], dtype=F64)
    variance = 1 + schedule(torch.tensor(schedule.t_min, dtype=F64)).sigma ** 2
    exact = -0.5 * (x[:, 0] ** 2 / variance + (2 * math.pi * variance).log())
    got = log_likelihood(Isotropic(schedule, 1.0), x, UniformLogSNR()(48, schedule))
    # The prior of EDM and VE is the data's convolution with sigma_max but for the data.
    torch.testing.assert_close(got, exact, atol=1e-3, rtol=0)


def test_bits_of_a_standard_normal() -> None:
    """The mean over data of -log2 p of N(0, 1) is its entropy, 2.047096 bits a dimension."""
    nodes = torch.linspace(-6, 6, 241, dtype=F64)[:, None]
    weights = torch.exp(-(nodes[:, 0] ** 2) / 2)
    bits = bits_per_dim(log_likelihood(Isotropic(VE(), 1.0), nodes, UniformLogSNR()(64, VE())), 1)
    assert (bits @ weights / weights.sum()).item() == pytest.approx(2.047096, abs=1e-3)
    assert bits_per_dim(torch.zeros(1), 4, 7.0).item() == 7


def test_a_mixture_integrates_to_one_and_is_its_own_density() -> None:
    oracle, side = two_modes(Flow()), torch.linspace(-3, 3, 49, dtype=F64)
    points = torch.cartesian_prod(side, side)
    logs = log_likelihood(oracle, points, Uniform()(40, Flow()))
    assert logs.exp().sum().item() * (side[1] - side[0]).item() ** 2 == pytest.approx(1, abs=1e-3)
    exact = oracle.log_density(points, torch.tensor(Flow().t_min, dtype=F64))
    inside = exact > -6
    torch.testing.assert_close(logs[inside], exact[inside], atol=2e-3, rtol=0)


def test_hutchinson_is_unbiased_and_per_sample() -> None:
    schedule, copies = VP(), 400
    oracle = two_modes(schedule)
    x = torch.tensor([[0.4, -0.3]], dtype=F64)
    grid = Karras()(12, schedule)
    exact = log_likelihood(oracle, x, grid)
    noise = Noise.from_seeds(list(range(copies)))
    drawn = log_likelihood(oracle, x.expand(copies, -1), grid, noise)
    assert abs(drawn.mean() - exact).item() < 3 * drawn.std().item() / copies**0.5 + 1e-9
    torch.testing.assert_close(log_likelihood(oracle, x.expand(3, -1), grid, noise[5:8]), drawn[5:8])
    # On an isotropic Gaussian the Jacobian is a multiple of the identity, and every probe is exact.
    image, round_oracle = torch.full((2, 1, 3, 3), 0.3, dtype=F64), Isotropic(schedule, 0.5)
    torch.testing.assert_close(
        log_likelihood(round_oracle, image, grid, noise[:2]), log_likelihood(round_oracle, image, grid)
    )


def test_more_probes_come_nearer_to_the_trace() -> None:
    """The first of several is the one that is drawn alone; their mean has its variance over their number."""
    schedule, copies = VP(), 300
    oracle, grid, noise = two_modes(schedule), Karras()(8, schedule), Noise.from_seeds(list(range(copies)))
    x = torch.tensor([[0.4, -0.3]], dtype=F64)
    exact = log_likelihood(oracle, x, grid)
    one, four = (log_likelihood(oracle, x.expand(copies, -1), grid, noise, probes) - exact for probes in (1, 4))
    assert four.var() < 0.4 * one.var() and abs(four.mean()) < 3 * four.std() / copies**0.5 + 1e-9
    torch.testing.assert_close(log_likelihood(oracle, x.expand(2, -1), grid, noise[7:9], 4) - exact, four[7:9])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 1 probe"):
        log_likelihood(gaussian(VP()), torch.zeros(1, 1), Uniform()(4, VP()), Noise.from_seeds([0]), 0)
    with pytest.raises(ValueError, match="seeds"):
        log_likelihood(gaussian(VP()), torch.zeros(2, 1, dtype=F64), Uniform()(4, VP()), Noise.from_seeds([0]))
    with pytest.raises(ValueError, match="grid"):
        log_likelihood(gaussian(VP()), torch.zeros(2, 1, dtype=F64), torch.tensor([1.0]))
