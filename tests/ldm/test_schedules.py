from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looping import each
from torch import Tensor

from ldm.exact import F64, scalar
from ldm.schedules import (
    EDM,
    GVP,
    SCHEDULES,
    VE,
    VP,
    DDPMCosine,
    DDPMLinear,
    DDPMScaledLinear,
    Flow,
    NoiseSchedule,
    SubVP,
    Table,
)

TABLES = [cls for cls in SCHEDULES if issubclass(cls, Table)]
ALL: list[NoiseSchedule] = [cls() for cls in SCHEDULES] + [cls(zero_terminal_snr=True) for cls in TABLES]  # type: ignore[call-arg]
every = each("schedule", ALL)


def times(schedule: NoiseSchedule, count: int = 501) -> torch.Tensor:
    return torch.linspace(max(schedule.t_min, 1e-5), 1, count, dtype=F64)


@every
def test_the_clean_end(schedule: NoiseSchedule) -> None:
    alpha, sigma = schedule(scalar(0.0))
    assert alpha == 1 and sigma == 0 and schedule.logsnr(scalar(0.0)) == math.inf
    assert schedule.time(scalar(math.inf)) == 0


@every
def test_the_noisy_end_is_what_is_declared(schedule: NoiseSchedule) -> None:
    alpha, sigma = schedule(scalar(1.0))
    assert (alpha == 0) == schedule.pure_noise == (schedule.logsnr(scalar(1.0)) == -math.inf)
    assert sigma > 0
    assert schedule.time(schedule.logsnr(scalar(1.0))) == pytest.approx(1, abs=1e-12)


@every
def test_logsnr_falls_and_is_that_of_the_level(schedule: NoiseSchedule) -> None:
    t = times(schedule)
    logsnr, (alpha, sigma) = schedule.logsnr(t), schedule(t)
    assert bool((logsnr.diff() < 0).all())
    torch.testing.assert_close(logsnr[:-1], 2 * (alpha.log() - sigma.log())[:-1], rtol=1e-9, atol=1e-9)


@every
def test_rates_are_the_derivatives(schedule: NoiseSchedule) -> None:
    t = times(schedule, 97)[1:-1] * 0.999 + 3e-4
    h = 1e-7
    ahead, behind, rates = schedule(t + h), schedule(t - h), schedule.rates(t)
    for rate, high, low in zip(rates, ahead, behind, strict=True):
        torch.testing.assert_close(rate, (high - low) / (2 * h), rtol=1e-5, atol=1e-6)


@every
def test_forward_derivatives_are_the_rates(schedule: NoiseSchedule) -> None:
    """Up to pure noise, of which the logarithm of a table's last signal-to-noise ratio has none."""
    t = times(schedule)
    _, slopes = torch.func.jvp(lambda t: torch.stack(list(schedule(t))), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(slopes, torch.stack(list(schedule.rates(t))), rtol=1e-9, atol=1e-11)


@every
@settings(max_examples=25)
@given(t=st.floats(0, 1))
def test_time_inverts_logsnr(schedule: NoiseSchedule, t: float) -> None:
    t = schedule.t_min + (1 - schedule.t_min) * t
    assert schedule.time(schedule.logsnr(scalar(t))).item() == pytest.approx(t, abs=1e-9)


@every
def test_a_level_keeps_the_shape_and_the_device_precision(schedule: NoiseSchedule) -> None:
    t = times(schedule, 4)
    for batched, alone in zip(schedule(t), schedule(t[2]), strict=True):
        assert batched.dtype == F64 and batched.shape == (4,) and alone.shape == () and batched[2] == alone
    for values in (schedule.rates(t).alpha, schedule.noise_level(t), schedule.input_scale(t), schedule.trained(t)):
        assert values.shape == (4,) and values.dtype == F64 and bool(values.isfinite().all())


@every
def test_trained_times_can_be_called(schedule: NoiseSchedule) -> None:
    trained = schedule.trained(torch.linspace(0, 1, 1001, dtype=F64))
    assert trained.min() >= schedule.t_min and trained.max() == 1


def printed(value: Tensor, text: str) -> bool:
    """Whether a float64 rounds to a number as it was printed: within half a unit of its last digit."""
    unit = 10.0 ** Decimal(text).as_tuple().exponent  # type: ignore[operator]
    return abs(value.item() - float(text)) <= 0.5 * unit * (1 + 1e-9)


@pytest.mark.parametrize(
    ("schedule", "index", "expected"),
    [
        (DDPMLinear(), [0, 250, 499, 999], ["0.9999", "0.521423", "0.0785872", "4.03583e-5"]),
        (DDPMScaledLinear(), [0, 499, 999], ["0.99915", "0.277670", "0.00466010"]),
        (DDPMScaledLinear(beta_min=0.0015, beta_max=0.0195), [999], ["1.42304e-4"]),
        (DDPMCosine(), [499, 999], ["0.493844", "2.42877e-9"]),
    ],
    ids=["linear", "scaled-linear", "ldm", "cosine"],
)
def test_published_tables(schedule: Table, index: list[int], expected: list[str]) -> None:
    t = (torch.tensor(index, dtype=F64) + 1) / schedule.steps
    alpha, sigma = schedule(t)
    assert all(map(printed, schedule.alpha_bar()[index], expected))
    torch.testing.assert_close(alpha**2, schedule.alpha_bar()[index], rtol=1e-13, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-15, atol=0)
    torch.testing.assert_close(schedule.noise_level(t), torch.tensor(index, dtype=F64), rtol=0, atol=1e-9)


def test_stable_diffusion_and_latent_diffusion_sigmas() -> None:
    ends = DDPMScaledLinear()(torch.tensor([0.001, 1.0], dtype=F64))
    assert all(map(printed, ends.sigma / ends.alpha, ["0.029167", "14.6146"]))
    assert printed(ends.alpha[1], "0.0682649")
    level = DDPMScaledLinear(beta_min=0.0015, beta_max=0.0195)(scalar(1.0))
    assert printed(level.sigma / level.alpha, "83.82")


def test_zero_terminal_snr_keeps_the_first_entry_and_zeroes_the_last() -> None:
    for cls in TABLES:
        plain, rescaled = cls().alpha_bar(), cls(zero_terminal_snr=True).alpha_bar()  # type: ignore[call-arg]
        assert rescaled[-1] == 0 and rescaled[0].item() == pytest.approx(plain[0].item(), abs=1e-15)


def test_vp_and_its_end() -> None:
    alpha, sigma = VP()(scalar(1.0))
    assert alpha.log().item() == pytest.approx(-5.025, abs=1e-12)
    assert sigma.item() == pytest.approx(0.9999784, abs=5e-8)
    sub = SubVP()(scalar(1.0))
    assert sub.alpha == alpha and sub.sigma.item() == pytest.approx(sigma.item() ** 2, abs=1e-15)


def test_ve_edm_gvp_and_flow_are_their_formulas() -> None:
    t = torch.tensor([0.25, 0.5], dtype=F64)
    torch.testing.assert_close(VE()(t).sigma, 0.01 * 5000**t)
    torch.testing.assert_close(EDM()(t).sigma, 80 * t)
    torch.testing.assert_close(GVP()(t).alpha ** 2 + GVP()(t).sigma ** 2, torch.ones(2, dtype=F64))
    torch.testing.assert_close(Flow()(t).alpha, 1 - t)
    at_half = scalar(0.5 / 80)
    assert EDM().noise_level(at_half).item() == pytest.approx(-0.173287, abs=5e-7)
    assert EDM().input_scale(at_half).item() == pytest.approx(1.414214, abs=5e-7)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Flow(t_min=1.0),
        lambda: VP(t_min=0.0),
        lambda: VP(beta_min=30.0),
        lambda: VE(sigma_min=0.0),
        lambda: EDM(sigma_data=-1.0),
        lambda: DDPMLinear(steps=1),
        lambda: DDPMLinear(beta_max=1.5),
    ],
)
def test_nonsense_is_refused(build: object) -> None:
    with pytest.raises(ValueError):
        build()  # type: ignore[operator]


def test_a_continuous_table_is_trained_between_its_entries_as_sr3() -> None:
    """SR3's 2,000 steps: each interval equally often, sqrt(alpha_bar) between its neighbours' and near to uniform
    there; the level that the network sees tells sqrt(alpha_bar), and the table itself is the same."""
    table = DDPMLinear(steps=2000, beta_min=1e-6, beta_max=1e-2)
    sr3 = DDPMLinear(steps=2000, beta_min=1e-6, beta_max=1e-2, continuous=True)
    u = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
    t, entry = sr3.trained(u), table.trained(u)
    assert t[u >= sr3.t_min].equal(u[u >= sr3.t_min]) and t.min() == sr3.t_min
    bounds = torch.cat([torch.ones(1, dtype=F64), sr3.alpha_bar().sqrt()])
    upper, lower, alpha = bounds[(entry * 2000).round().long() - 1], bounds[(entry * 2000).round().long()], sr3(t).alpha
    assert bool((alpha <= upper * (1 + 1e-12)).all() and (alpha >= lower * (1 - 1e-12)).all())
    within = ((upper - alpha) / (upper - lower))[u > 0.05]  # 0 at the cleaner neighbour, 1 at the noisier
    assert (within - (2000 * u[u > 0.05]) % 1).abs().max() < 0.003
    assert sr3.noise_level(t).diff().min() >= 0 and torch.equal(sr3(entry).alpha, table(entry).alpha)
    assert torch.equal(table.trained(u), (u * 2000).ceil() / 2000)
