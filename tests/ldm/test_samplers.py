from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch
from torch import Tensor

from ldm.diffusion import Denoised, Diffusion
from ldm.grids import Karras, Uniform
from ldm.noise import Noise
from ldm.predictions import PREDICTIONS
from ldm.samplers import (DDIM, DDPM, DEIS, IPNDM, LMS, RK4, SAMPLERS, DDIMInversion, DPMpp2M, DPMpp2S, DPMpp3M, DPMpp3S,
                          Euler, EulerMaruyama, Heun, Langevin, Midpoint, PredictorCorrector, ReverseDiffusion, Sampler,
                          Snapshot, UniPC, check_grid, mix, prior, sample)
from ldm.schedules import EDM, SCHEDULES, VE, VP, DDPMLinear, Flow, NoiseSchedule, Table
from oracles import F64, Counted, Impulses, Isotropic, Through, fitted_order, gaussian, scalar, two_modes

ENDS: list[NoiseSchedule] = [cls() for cls in SCHEDULES] + [
    cls(zero_terminal_snr=True) for cls in SCHEDULES if issubclass(cls, Table)]  # type: ignore[call-arg]
every_sampler = pytest.mark.parametrize("sampler", [cls() for cls in SAMPLERS], ids=repr)
every_schedule = pytest.mark.parametrize("schedule", ENDS, ids=repr)
ONE = Noise.from_seeds([0])


def final_variance(sampler: Sampler, schedule: NoiseSchedule, grid: Tensor, std: float, start: float) -> float:
    """The variance of the result on data N(0, std^2), the starting x having variance start^2.

    Exact, by impulses, for every sampler that is linear on Gaussian data; one whose steps depend on norms (order 0) is
    measured on 32768 numbers, within one per cent.
    """
    if sampler.order == 0:
        noise = Noise.from_seeds(list(range(16)))
        x = start * noise.normal((2048,), "start", dtype=F64)
        return sample(sampler, Isotropic(schedule, std), x, grid, noise).var().item()
    batch = 2 + len(grid) * sampler.calls
    x = torch.zeros(batch, 1, dtype=F64)
    x[0] = start
    return sample(sampler, Isotropic(schedule, std), x, grid, Impulses(batch)).square().sum().item()


def marginal(schedule: NoiseSchedule, t: Tensor, std: float) -> float:
    """The exact variance of x_t on data N(0, std^2)."""
    alpha, sigma = schedule(t)
    return ((alpha * std) ** 2 + sigma**2).item()


def edm(sampler: Sampler, steps: int = 18) -> float:
    return sample(sampler, gaussian(EDM()), torch.full((1, 1), 80.0, dtype=F64), Karras()(steps, EDM()), ONE).item()


def log_grid_error(sampler: Sampler, steps: int) -> float:
    """The error from sigma 10 to 0.1 on a log grid, on the EDM process."""
    grid, x = torch.logspace(1, -1, steps + 1, dtype=F64) / 80, torch.full((1, 1), 10.0, dtype=F64)
    return abs(sample(sampler, gaussian(EDM()), x, grid, ONE).item() - 10 * math.sqrt((0.25 + 0.01) / (0.25 + 100)))


def flow(sampler: Sampler, steps: int, t_min: float = 1e-5) -> float:
    schedule = Flow(t_min=t_min)
    return sample(sampler, gaussian(schedule), torch.ones(1, 1, dtype=F64), Uniform()(steps, schedule), ONE).item()


# Every sampler on every process


@every_schedule
@every_sampler
def test_the_data_come_out_on_every_process_and_prediction(sampler: Sampler, schedule: NoiseSchedule) -> None:
    """64 steps (256) give N(0, 1/4) its variance within what the order allows; every allowed prediction agrees."""
    # Langevin dynamics need many levels.
    std, grid = 0.5, Karras()(64 if sampler.order else 256, schedule)
    variance = final_variance(sampler, schedule, grid, std, marginal(schedule, scalar(1.0), std) ** 0.5)
    assert variance == pytest.approx(std**2, rel=0.3 if sampler.order < 2 else 0.03)
    noise, oracle = Noise.from_seeds([1, 2, 3]), two_modes(schedule)
    x, grid = prior(schedule, (2,), noise, dtype=F64), Uniform()(6, schedule)
    direct = sample(sampler, oracle, x, grid, noise)
    for prediction in (cls() for cls in PREDICTIONS):
        if prediction.refusal(schedule) is None:
            through = Through(oracle, Diffusion(schedule=schedule, prediction=prediction))
            # x0 = (x - sigma eps) / alpha costs 1 / alpha at t = 1, and that is all.
            slack = 1e-11 / max(schedule(scalar(1.0)).alpha.item(), 1e-3)
            torch.testing.assert_close(sample(sampler, through, x, grid, noise), direct, rtol=slack, atol=slack)


@every_schedule
@every_sampler
def test_order_of_convergence(sampler: Sampler, schedule: NoiseSchedule) -> None:
    """The error of the variance from log-SNR -4.6 to 4.6, on a log grid, falls with the order the sampler declares."""
    if sampler.order == 0:
        pytest.skip("Langevin steps have a bias of their own")
    counts, errors = [16, 32, 64, 128] if sampler.order < 4 else [8, 16, 32, 64], []
    for steps in counts:
        grid = schedule.time(torch.linspace(-4.6, 4.6, steps + 1, dtype=F64))
        variance = final_variance(sampler, schedule, grid, 0.5, marginal(schedule, grid[0], 0.5) ** 0.5)
        errors.append(abs(variance - marginal(schedule, grid[-1], 0.5)))
    assert fitted_order(counts[1:], errors[1:]) > sampler.order - 0.25


@every_schedule
@every_sampler
def test_one_step_and_two_reach_a_finite_sample(sampler: Sampler, schedule: NoiseSchedule) -> None:
    noise = Noise.from_seeds([4, 5])
    for steps in (1, 2):
        for dtype in (torch.float32, torch.bfloat16):
            x = prior(schedule, (3,), noise, dtype=dtype)
            drawn = sample(sampler, Smooth(schedule), x, Uniform()(steps, schedule), noise)
            assert drawn.dtype == dtype and bool(drawn.isfinite().all())


@dataclasses.dataclass
class Smooth:
    """A bounded, elementwise denoiser, so that the samples of a batch cannot meet inside it."""

    schedule: NoiseSchedule

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = self.schedule(t)
        x0 = torch.tanh(x * (alpha / (alpha**2 + sigma**2)))
        return Denoised(x0, (x - alpha * x0) / sigma)


@every_sampler
@pytest.mark.parametrize("schedule", [Flow(), VP(), EDM()], ids=repr)
def test_a_sample_does_not_depend_on_its_batch(sampler: Sampler, schedule: NoiseSchedule) -> None:
    noise = Noise.from_seeds([7, 8, 9, 10, 11])
    x, grid = prior(schedule, (2, 3), noise, dtype=F64), Uniform()(9, schedule)
    whole = sample(sampler, Smooth(schedule), x, grid, noise)
    parts = [sample(sampler, Smooth(schedule), x[part], grid, noise[part]) for part in (slice(0, 1), slice(1, 5))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


@every_sampler
def test_the_network_is_called_as_often_as_declared_and_where_it_may_be(sampler: Sampler) -> None:
    for schedule in ENDS:
        counted = Counted(gaussian(schedule))
        noise = Noise.from_seeds([1])
        sample(sampler, counted, prior(schedule, (1,), noise, dtype=F64), Uniform()(10, schedule), noise)
        assert 10 <= len(counted.times) <= 10 * sampler.calls + 1
        assert min(counted.times) >= schedule.t_min and max(counted.times) <= 1


@every_sampler
def test_watching_changes_nothing_and_shows_every_step(sampler: Sampler) -> None:
    schedule, noise = Flow(), Noise.from_seeds([1, 2])
    x, grid, seen = prior(schedule, (2,), noise), Uniform()(5, schedule), list[Snapshot]()
    watched = sample(sampler, Smooth(schedule), x, grid, noise, seen.append)
    assert torch.equal(watched, sample(sampler, Smooth(schedule), x, grid, noise))
    assert [shot.step for shot in seen] == list(range(5)) and [shot.t for shot in seen] == grid[1:].tolist()
    assert torch.equal(seen[-1].x, watched) and all(shot.x0.shape == x.shape for shot in seen)


@every_sampler
def test_samplers_are_frozen_configs(sampler: Sampler) -> None:
    assert dataclasses.is_dataclass(sampler) and hash(sampler) == hash(dataclasses.replace(sampler))
    assert inspect.getdoc(type(sampler)) and type(sampler).kind == sampler.kind


def test_samples_of_a_mixture_have_its_moments() -> None:
    oracle, noise = two_modes(Flow()), Noise.from_seeds(list(range(4000)))
    exact = oracle.weights @ oracle.means
    for sampler in (DDPM(), Heun(), DPMpp2M()):
        x = sample(sampler, oracle, prior(oracle.schedule, (2,), noise, dtype=F64), Uniform()(40, oracle.schedule), noise)
        torch.testing.assert_close(x.mean(0), exact, atol=0.05, rtol=0)
        assert (x[:, 0] > 0).double().mean().item() == pytest.approx(0.3, abs=0.03)


# The numbers of the reference


def test_ddpm_variances() -> None:
    schedule, grid = DDPMLinear(), Uniform()(1000, DDPMLinear())
    assert final_variance(DDPM(), schedule, grid, 1, 1) == pytest.approx(0.991067, abs=5e-7)
    assert final_variance(DDPM(variance="large"), schedule, grid, 1, 1) == pytest.approx(0.999900, abs=5e-7)
    assert final_variance(DDIM(eta=1), schedule, grid, 1, 1) == pytest.approx(0.991067, abs=5e-7)


def test_ddim_fifty_steps() -> None:
    grid = torch.cat([torch.arange(981, 0, -20, dtype=F64), torch.zeros(1, dtype=F64)]) / 1000
    for eta, expected in [(0, 0.929449), (1, 0.857434)]:
        assert final_variance(DDIM(eta=eta), DDPMLinear(), grid, 1, 1) == pytest.approx(expected, abs=5e-7)


def test_posterior_variance_of_the_second_step() -> None:
    """beta~[1] of the linear table, seen as the variance of one ancestral step from a denoiser that answers 0."""
    class Zero(Smooth):
        def __call__(self, x: Tensor, t: Tensor) -> Denoised:
            return Denoised(torch.zeros_like(x), torch.zeros_like(x))

    grid = torch.tensor([0.002, 0.001], dtype=F64)
    x = sample(DDPM(), Zero(DDPMLinear()), torch.zeros(2, 1, dtype=F64), grid, Impulses(2))
    assert x.square().sum().item() == pytest.approx(5.45319e-5, rel=1e-6)


@pytest.mark.parametrize(("sampler", "expected"), [
    (Euler(variable="sigma"), 0.42303144), (Heun(variable="sigma"), 0.52762464), (RK4(variable="sigma"), 0.50047113),
    (DPMpp2M(), 0.53114007)], ids=repr)
def test_eighteen_edm_steps(sampler: Sampler, expected: float) -> None:
    assert edm(sampler) == pytest.approx(expected, abs=5e-9)


def test_many_edm_steps_are_exact() -> None:
    exact = 80 * math.sqrt(0.25 / (0.25 + 6400))
    assert exact == pytest.approx(0.49999023, abs=5e-9)
    assert edm(RK4(variable="sigma"), 256) == pytest.approx(exact, abs=1e-5)


def test_flow_steps() -> None:
    for steps, expected in [(1, 0.0), (10, 0.4307826), (50, 0.4853967)]:
        assert flow(Euler(), steps) == pytest.approx(expected, abs=5e-8)
    assert flow(Midpoint(), 10) == pytest.approx(0.4998847, abs=5e-8)
    # The classic rule calls the network at t = 0, which a velocity allows when it is declared.
    assert flow(RK4(), 4, t_min=0.0) == pytest.approx(0.5000061, abs=5e-8)
    assert flow(RK4(), 64) == pytest.approx(0.5, abs=1e-6)


def test_error_slopes_on_the_edm_problem() -> None:
    """sigma 10 to 0.1 on a log grid, integrated in sigma: 0.99, 2.01, 4.00; 2M 1.94-1.99, UniPC-2 2.94-2.99."""
    def slope(sampler: Sampler) -> float:
        counts = [32, 64, 128]
        return fitted_order(counts, [log_grid_error(sampler, steps) for steps in counts])

    assert slope(Euler(variable="sigma")) == pytest.approx(0.99, abs=0.01)
    assert slope(Heun(variable="sigma")) == pytest.approx(2.01, abs=0.01)
    assert slope(RK4(variable="sigma")) == pytest.approx(4.00, abs=0.02)
    assert slope(UniPC(solver_order=1, corrector=False)) == pytest.approx(1, abs=0.01)
    assert slope(UniPC(solver_order=1)) == pytest.approx(2, abs=0.01)
    assert 1.94 < slope(DPMpp2M()) < 1.99 and 2.94 < slope(UniPC()) < 2.99
    assert slope(DPMpp3S()) == pytest.approx(3, abs=0.1) and slope(DPMpp2S()) == pytest.approx(2, abs=0.05)
    assert log_grid_error(UniPC(solver_order=3), 64) < 1e-7


def test_ddim_inversion() -> None:
    grid = torch.cat([torch.zeros(1, dtype=F64), torch.arange(1, 982, 20, dtype=F64)]) / 1000
    oracle, x = gaussian(DDPMLinear(), 1.0), torch.ones(1, 1, dtype=F64)
    noised = sample(DDIMInversion(), oracle, x, grid, ONE)
    assert sample(DDIM(), oracle, noised, grid.flip(0), ONE).item() == pytest.approx(0.9983563, abs=5e-8)


def euler_maruyama_of_score_sde(schedule: NoiseSchedule, steps: int, eps: float) -> float:
    """The variance on G(1) with that code's own bookkeeping: times from linspace(1, eps), every step of length 1 / steps, the
    last not a landing but a hair longer, its noise left out."""
    batch = steps + 2
    x, noise = torch.zeros(batch, 1, dtype=F64), Impulses(batch)
    x[0] = schedule.prior_std
    for t in torch.linspace(1, eps, steps, dtype=F64):
        x, _ = EulerMaruyama().step(Isotropic(schedule, 1.0), x, t, t - 1 / steps - 1e-15, None, noise)
    x[steps] = 0
    return x.square().sum().item()


def test_reverse_sde() -> None:
    assert euler_maruyama_of_score_sde(VP(), 1000, 1e-3) == pytest.approx(1.001280, abs=5e-7)
    assert euler_maruyama_of_score_sde(VP(), 100, 1e-3) == pytest.approx(1.013009, abs=5e-7)
    assert euler_maruyama_of_score_sde(VE(), 1000, 1e-5) == pytest.approx(1.001102, abs=5e-7)


def test_ve_steps() -> None:
    grid = torch.cat([torch.linspace(1, 1e-5, 1000, dtype=F64), torch.zeros(1, dtype=F64)])
    for sampler, expected in [(ReverseDiffusion(), 1.008467), (DDPM(variance="large"), 1.008467), (DDPM(), 0.991424)]:
        assert final_variance(sampler, VE(), grid, 1, 50) == pytest.approx(expected, abs=5e-7)


def test_annealed_langevin_has_its_known_bias() -> None:
    """232 levels from 50 to 0.01, 5 steps each, from U[0, 1]: 14 % too much variance, by the scheme's own doing."""
    schedule, batch = VE(), 232 * 5 + 2
    grid = torch.cat([torch.linspace(1, 0, 232, dtype=F64).clamp(min=1e-12), torch.zeros(1, dtype=F64)])
    x = torch.zeros(batch, 1, dtype=F64)
    x[0] = (1 / 12) ** 0.5
    drawn = sample(Langevin(step_size=6.2e-6 / 0.01**2), Isotropic(schedule, 1.0), x, grid, Impulses(batch))
    assert drawn.square().sum().item() == pytest.approx(1.138567, abs=5e-7)


def test_one_corrector_step() -> None:
    """On a stationary N(0, sigma^2) in many dimensions variance grows by 1.002621, towards a fixed point of 1 + snr^2."""
    noise = Noise.from_seeds(list(range(4)))
    schedule, t = VE(), scalar(0.6)
    std = (1 + schedule(t).sigma ** 2).sqrt()
    x, oracle, corrector = std * noise.normal((200_000,), "x", dtype=F64), Isotropic(schedule, 1.0), PredictorCorrector()
    x = x * (std / x.square().mean(1, keepdim=True).sqrt())
    once = corrector.correct(oracle, x, t, t, noise.fold(0))
    assert (once.square().mean() / std**2).item() == pytest.approx(1.002621, abs=2e-3)
    for index in range(60):
        x = corrector.correct(oracle, x[:, :20_000], t, t, noise.fold("walk", index))
    assert (x.square().mean() / std**2).item() == pytest.approx(1 + 0.16**2, abs=8e-3)


def test_no_corrector_is_the_predictor_bit_for_bit() -> None:
    noise, schedule = Noise.from_seeds([1, 2]), VP()
    x, grid = prior(schedule, (3,), noise), Uniform()(8, schedule)
    expected = sample(ReverseDiffusion(), Smooth(schedule), x, grid, noise)
    for idle in (PredictorCorrector(snr=0.0), PredictorCorrector(corrector_steps=0)):
        assert torch.equal(sample(idle, Smooth(schedule), x, grid, noise), expected)


MULTISTEP = [DPMpp2M(), DPMpp3M(), UniPC(solver_order=3, corrector=False), DEIS(), LMS(solver_order=3), LMS()]


@pytest.mark.parametrize(("sampler", "power"), list(zip(MULTISTEP, [3, 4, 4, 4, 4, 5], strict=True)), ids=repr)
def test_one_multistep_step_errs_by_its_own_power(sampler: Sampler, power: int) -> None:
    """With a history on the exact path, the last of some equal steps errs by h^(order + 1): no trace of the start."""
    schedule, errors, widths = EDM(), [], [0.08, 0.04, 0.02]
    for width in widths:
        sigmas = torch.exp(width * torch.arange(5, -1, -1, dtype=F64)) * 0.3
        path = torch.sqrt(0.25 + sigmas**2)[:, None, None]
        memory = None
        for index in range(5):
            times = sigmas[index] / 80, sigmas[index + 1] / 80
            x, memory = sampler.step(gaussian(schedule), path[index], *times, memory, ONE)
        errors.append((x - path[-1]).abs().item())
    assert fitted_order([1, 2, 4], errors) == pytest.approx(power, abs=0.4)


# Identities


def same(a: Sampler, b: Sampler, schedule: NoiseSchedule, grid: Tensor) -> None:
    noise = Noise.from_seeds([1, 2, 3])
    x = prior(schedule, (2,), noise, dtype=F64)
    left, right = (sample(sampler, two_modes(schedule), x, grid, noise) for sampler in (a, b))
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@every_schedule
def test_ddim_identities(schedule: NoiseSchedule) -> None:
    grid = Uniform()(12, schedule)
    same(DDIM(eta=1.0), DDPM(), schedule, grid)
    same(DDIM(), Euler(), schedule, grid)
    same(DDIM(), Euler(variable="sigma"), schedule, grid)


@every_schedule
def test_first_order_members_of_each_family_are_ddim(schedule: NoiseSchedule) -> None:
    grid = Uniform()(12, schedule)
    for first in (UniPC(solver_order=1, corrector=False), DEIS(solver_order=1), LMS(solver_order=1), IPNDM(solver_order=1)):
        same(first, DDIM(), schedule, grid)
    same(UniPC(solver_order=2, corrector=False), DPMpp2M(), schedule, grid)


def test_ddim_on_flow_is_euler_on_the_velocity() -> None:
    schedule = Flow()
    same(DDIM(), Euler(variable="t"), schedule, Uniform()(12, schedule))
    oracle, x = two_modes(schedule), torch.tensor([[0.7, -1.1]], dtype=F64)
    stepped, _ = DDIM().step(oracle, x, scalar(0.6), scalar(0.5), None, ONE)
    torch.testing.assert_close(stepped, x - 0.1 * oracle.velocity(x, scalar(0.6)))


@every_schedule
def test_the_prior_is_the_marginal_at_one(schedule: NoiseSchedule) -> None:
    drawn = prior(schedule, (4096,), Noise.from_seeds([3, 4]), dtype=F64)
    # EDM and VE start from sigma_max; the data's own variance is below one part in a thousand there.
    assert drawn.std().item() == pytest.approx(marginal(schedule, scalar(1.0), 1.0) ** 0.5, rel=0.03)


# Refusals


@pytest.mark.parametrize("grid", [[1.0], [1.2, 0.0], [1.0, -0.1], [1.0, 0.5, 0.5, 0.0], [1.0, 0.2, 0.6], [1.0, math.nan]])
def test_bad_grids_are_refused(grid: list[float]) -> None:
    with pytest.raises(ValueError, match="grid"):
        check_grid(torch.tensor(grid))


@pytest.mark.parametrize("build", [
    lambda: DDIM(eta=-0.1), lambda: DDIM(eta=1.1), lambda: DDPM(variance="medium"), lambda: Euler(variable="lambda"),
    lambda: sample(DDIM(), gaussian(VE()), torch.zeros(2, 1), torch.tensor([1.0, 0.0]), ONE),
    lambda: sample(DDPM(variance="learned"), gaussian(VE()), torch.zeros(1, 1), torch.tensor([1.0, 0.5]), ONE),
    lambda: sample(DDIM(eta=0.5), gaussian(VE()), torch.zeros(1, 1), torch.tensor([0.5, 1.0]), ONE),
])
def test_nonsense_is_refused(build: object) -> None:
    with pytest.raises(ValueError):
        build()  # type: ignore[operator]


def test_mix_is_the_process() -> None:
    ends = Denoised(torch.ones(1), torch.full((1,), 2.0))
    assert mix(Flow()(scalar(0.25)), ends).item() == 0.75 + 0.5
