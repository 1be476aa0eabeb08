"""What holds for any times, numbers and batches, over all members of each family."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from looping import each
from torch import Tensor

from ldm.diffusion import Denoised, Diffusion
from ldm.exact import F64, Counted, Isotropic, Smooth, gaussian, scalar, two_modes
from ldm.grids import Given, Uniform
from ldm.noise import Noise
from ldm.predictions import PREDICTIONS
from ldm.samplers import RK4, SAMPLERS, DDIMInversion, Euler, Sampler, Snapshot, prior, sample
from ldm.schedules import EDM, SCHEDULES, VP, DDPMLinear, Flow, NoiseSchedule, Table

ENDS: list[NoiseSchedule] = [cls() for cls in SCHEDULES] + [
    cls(zero_terminal_snr=True) for cls in SCHEDULES if issubclass(cls, Table)  # type: ignore[call-arg]
]
FOUR: list[NoiseSchedule] = [Flow(), VP(), EDM(), DDPMLinear(zero_terminal_snr=True)]
every_sampler = pytest.mark.parametrize("sampler", [cls() for cls in SAMPLERS], ids=repr)
number = st.floats(-3, 3, allow_nan=False)


@each("schedule", ENDS)
@given(a=st.floats(0, 1), b=st.floats(0, 1))
def test_logsnr_falls_between_any_two_times(schedule: NoiseSchedule, a: float, b: float) -> None:
    assume(b - a > 1e-9)
    early, late = (schedule.logsnr(scalar(t)) for t in (a, b))
    assert early > late


@each("schedule", ENDS)
@settings(max_examples=10)
@given(u=st.floats(0.01, 0.99), x0=number, eps=number)
def test_every_prediction_is_converted_to_every_other(schedule: NoiseSchedule, u: float, x0: float, eps: float) -> None:
    """By way of both ends: what one network would answer, from what another has."""
    t = scalar(schedule.t_min + (1 - schedule.t_min) * u)
    clean, noise = torch.full((1, 1), x0, dtype=F64), torch.full((1, 1), eps, dtype=F64)
    allowed = [Diffusion(schedule=schedule, prediction=cls()) for cls in PREDICTIONS if not cls().refusal(schedule)]
    targets = [diffusion.target(clean, noise, t) for diffusion in allowed]
    x_t = allowed[0].perturb(clean, noise, t)
    for source, answer in zip(allowed, targets, strict=True):
        ends = source.recover(x_t, answer, t)
        for diffusion, expected in zip(allowed, targets, strict=True):
            # Rounding grows by the condition of the worst pair, 1 / alpha or 1 / sigma times a rate, or sigma itself.
            size = 1 + expected.abs().item() + abs(x0) + abs(eps)
            alpha, sigma = schedule(t)
            growth = (1 + sigma) * (1 + schedule.rates(t).sigma.abs()) / (alpha * sigma).clamp(max=1) ** 2
            slack = 1e-12 * size * growth
            assert (diffusion.target(ends.x0, ends.eps, t) - expected).abs().item() <= slack


@pytest.mark.parametrize("sampler", [cls() for cls in SAMPLERS if cls().order], ids=repr)
@settings(max_examples=8)
@given(schedule=st.sampled_from(FOUR), a=number, b=number, x=number, y=number)
def test_samplers_are_linear_on_gaussian_data(
    sampler: Sampler, schedule: NoiseSchedule, a: float, b: float, x: float, y: float
) -> None:
    """Affine in x with the noise held: S(ax + by) - S(0) = a (S(x) - S(0)) + b (S(y) - S(0))."""
    start = schedule.prior_std * torch.tensor([[a * x + b * y], [x], [y], [0.0]], dtype=F64)
    noise, oracle = Noise.from_seeds([7, 7, 7, 7]), Isotropic(schedule, 0.5, 0.3)
    both, one, other, none = sample(sampler, oracle, start, Uniform()(5, schedule), noise)
    torch.testing.assert_close(both - none, a * (one - none) + b * (other - none), rtol=1e-9, atol=1e-9)


@every_sampler
@settings(max_examples=6)
@given(schedule=st.sampled_from(FOUR), order=st.permutations(range(5)), cut=st.integers(1, 4))
def test_a_sample_does_not_depend_on_its_place_in_a_batch(
    sampler: Sampler, schedule: NoiseSchedule, order: list[int], cut: int
) -> None:
    noise, grid = Noise.from_seeds([3, 1, 4, 1, 5]), Uniform()(4, schedule)
    x = prior(schedule, (2, 2), noise, dtype=F64)
    whole, index = sample(sampler, Smooth(schedule), x, grid, noise), torch.tensor(order)
    for part in (index[:cut], index[cut:]):
        got = sample(sampler, Smooth(schedule), x[part], grid, noise[part])
        torch.testing.assert_close(got, whole[part], rtol=1e-12, atol=1e-12)


@settings(max_examples=30)
@given(times=st.lists(st.floats(1e-3, 1), min_size=1, max_size=12, unique=True), schedule=st.sampled_from(FOUR))
def test_any_list_of_times_can_be_walked(times: list[float], schedule: NoiseSchedule) -> None:
    falling = (*sorted((max(t, schedule.t_min) for t in times), reverse=True), 0.0)
    grid = Given(times=falling)(len(times), schedule)
    counted, x = Counted(gaussian(schedule)), torch.ones(1, 1, dtype=F64)
    sample(Euler(), counted, x, grid, Noise.from_seeds([0]))
    assert counted.times == list(falling[:-1])


# What a sampler says of itself


@every_sampler
@each("schedule", FOUR)
def test_away_from_the_ends_a_step_costs_what_is_declared(sampler: Sampler, schedule: NoiseSchedule) -> None:
    """Exactly, but for one call more in a whole run where a rule says so (`pndm` at its start, `unipc` at its end)."""
    counted, grid = Counted(Isotropic(schedule)), schedule.time(torch.linspace(-4, 4, 13, dtype=F64))
    sample(sampler, counted, torch.ones(1, 1, dtype=F64), grid, Noise.from_seeds([0]))
    spare = len(counted.times) - 12 * sampler.calls
    assert spare >= 12 if not sampler.calls else spare == (sampler.kind in ("pndm", "unipc"))


@every_sampler
def test_watching_is_a_stream_of_what_the_network_last_expected(sampler: Sampler) -> None:
    """Each snapshot comes before the calls of the next step, and shows the newest estimate of x0."""
    answers, events = list[Denoised](), list[str]()

    class Heard(Smooth):
        def __call__(self, x: Tensor, t: Tensor) -> Denoised:
            answers.append(super().__call__(x, t))
            events.append("call")
            return answers[-1]

    def watch(shot: Snapshot) -> None:
        assert torch.equal(shot.x0, answers[-1].x0) and shot.calls == len(answers)
        events.append("shot")

    noise = Noise.from_seeds([0, 1])
    sample(sampler, Heard(Flow()), prior(Flow(), (2,), noise), Uniform()(4, Flow()), noise, watch)
    parts = "".join(event[0] for event in events).split("s")
    assert len(parts) == 5 and parts[0] and parts[1] and parts[-1] == ""


@each("schedule", FOUR)
@every_sampler
def test_a_sampler_that_rises_comes_back_and_any_other_refuses(sampler: Sampler, schedule: NoiseSchedule) -> None:
    """From data to noise as a rule of order 4 goes, and down again by the same steps."""
    noise, oracle = Noise.from_seeds([1, 2]), two_modes(schedule)
    x, up = noise.normal((2,), "data", dtype=F64), schedule.time(torch.linspace(4.6, -4.6, 97, dtype=F64))
    if not sampler.rises:
        with pytest.raises(ValueError, match=f"{sampler.kind} .* must fall"):
            sample(sampler, oracle, x, up, noise)
        return
    raised, slack = sample(sampler, oracle, x, up, noise), 0.2 if sampler.order == 1 else 5e-3
    exact = sample(RK4(), oracle, x, up[::2], noise)
    assert (raised - exact).abs().max() < slack * schedule(up[-1]).sigma
    assert (sample(sampler, oracle, raised, up.flip(0), noise) - x).abs().max() < slack


def test_inversion_refuses_to_fall() -> None:
    with pytest.raises(ValueError, match="must rise"):
        sample(DDIMInversion(), gaussian(Flow()), torch.ones(1, 1), Uniform()(4, Flow()), Noise.from_seeds([0]))
