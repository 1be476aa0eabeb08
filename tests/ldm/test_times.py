"""Times that depend on more than one sample: strata of a batch, losses seen; and the learned weighting."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion import Diffusion
from ldm.exact import F64, gaussian, scalar
from ldm.grids import Karras as KarrasGrid
from ldm.noise import Noise
from ldm.objectives import Denoising
from ldm.predictions import EDMF, Velocity
from ldm.samplers import RK4, sample
from ldm.schedules import EDM, VP, DDPMLinear, Flow
from ldm.times import TIMES, Cubic, Karras, LossAware, Places, UniformTimes
from ldm.uncertainty import Uncertainty, Weighed
from ldm.weighting import EDMWeight, Learned, UniformWeight

U = (torch.arange(20000, dtype=F64) + 0.5) / 20000
NOTHING = Cond(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))


def objective(times: object, weighting: object = None) -> Denoising:
    diffusion = Diffusion(schedule=Flow(), prediction=Velocity())
    return Denoising(diffusion=diffusion, times=times, weighting=weighting or UniformWeight())  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", TIMES)
def test_strata_hold_one_time_each_whatever_the_process_layout(cls: type) -> None:
    rule, count = objective(cls(stratified=True)), 32
    noise, x0 = Noise.from_seeds(list(range(100, 100 + count))), torch.zeros(count, 1)
    position = torch.arange(100, 100 + count) % count
    whole = rule.draw(x0, noise, Places(position, count)).t
    u = cls().draw((torch.arange(count + 1, dtype=F64) / count).clamp(1e-12, 1 - 1e-12), Flow())[0]
    for t, p in zip(whole, position, strict=True):
        assert u[p] <= t <= u[p + 1]
    split = [rule.draw(x0[part], noise[part], Places(position[part], count)).t for part in (slice(0, 5), slice(5, 32))]
    torch.testing.assert_close(torch.cat(split), whole, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="places"):
        rule.draw(x0, noise)


def test_stratified_means_vary_less() -> None:
    means: dict[bool, list[Tensor]] = {False: [], True: []}
    for step in range(40):
        noise = Noise.from_seeds(list(range(64))).fold(step)
        for strict, found in means.items():
            rule = objective(UniformTimes(stratified=strict))
            t = rule.draw(torch.zeros(64, 1), noise, Places(torch.arange(64), 64)).t
            found.append(t.mean())
    assert torch.stack(means[True]).std() < 0.1 * torch.stack(means[False]).std()


# Loss-aware times


def seen_after(rule: LossAware, loss: Tensor, t: Tensor) -> Tensor:
    return rule.updated(rule.start(), t, loss)


@pytest.mark.parametrize("schedule", [Flow(), DDPMLinear(), VP()], ids=repr)
def test_loss_aware_times_keep_the_mean_and_lower_the_variance(schedule: Flow) -> None:
    """Exactly, up to the width of the strata: the mean of factor * loss is that of the loss at uniform times."""
    rule, t = LossAware(bins=20), schedule.trained(U)
    plain = (4 * t).exp()
    drawn, factor = rule.draw(U, schedule, seen_after(rule, plain, t))
    weighed = factor * (4 * drawn).exp()
    assert weighed.mean().item() == pytest.approx(plain.mean().item(), rel=1e-3)
    assert weighed.std() < 0.1 * plain.std()
    assert drawn.min() >= schedule.t_min and drawn.max() <= 1


def test_probabilities_are_the_roots_of_the_mean_squares() -> None:
    rule = LossAware(bins=4, floor=0.2, memory=0.5)
    t = torch.tensor([0.1, 0.2, 0.3, 0.6, 0.9], dtype=F64)
    seen = seen_after(rule, torch.tensor([1.0, 7.0, 2.0, 3.0, 4.0], dtype=F64), t)
    assert seen.tolist() == [25, 4, 9, 16]
    torch.testing.assert_close(
        rule.probabilities(seen), 0.05 + 0.8 * torch.tensor([5, 2, 3, 4], dtype=F64) / 14
    )
    again = rule.updated(seen, t[:1], torch.tensor([1.0]))
    assert again.tolist() == [13, 4, 9, 16]


def test_until_every_bin_was_met_times_are_uniform() -> None:
    rule = LossAware(bins=3)
    half = seen_after(rule, torch.ones(2), torch.tensor([0.1, 0.5], dtype=F64))
    for seen in (None, rule.start(), half):
        t, factor = rule.draw(U, Flow(), seen)
        torch.testing.assert_close(t, Flow().trained(U))
        torch.testing.assert_close(factor, torch.ones_like(U))


def test_statistics_are_those_of_the_global_batch() -> None:
    """Two processes that sum their parts come to what one would have seen."""
    rule = LossAware(bins=5)
    t, loss = U[::400], (U[::400] * 3).exp()
    parts: list[Tensor] = []

    def record(sums: Tensor) -> Tensor:
        parts.append(sums)
        return sums

    for share in (slice(0, 17), slice(17, 50)):
        rule.updated(rule.start(), t[share], loss[share], record)
    both = rule.updated(rule.start(), t[:17], loss[:17], lambda sums: parts[0] + parts[1])
    torch.testing.assert_close(both, seen_after(rule, loss, t))


def test_the_objective_divides_by_the_probability() -> None:
    rule, noise = LossAware(bins=4), Noise.from_seeds(list(range(8)))
    x0, seen = noise.normal((2,), "data"), torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=F64)
    draw = objective(rule).draw(x0, noise, seen=seen)
    losses = objective(rule).losses(lambda x, level, cond: torch.zeros_like(x), x0, NOTHING, draw)
    t, factor = rule.draw(noise.uniform((), "time"), Flow(), seen)
    torch.testing.assert_close(draw.t, t)
    torch.testing.assert_close(losses.total, losses.seen * factor.float())


def test_the_mean_velocity_identity_of_two_times() -> None:
    """u(z, r, t) = (z_t - z_r) / (t - r) on G(.5): u(1, 0, 1) = 0.5 and u + (t - r) du/dt = v = 1.2195122 at 0.7."""
    oracle = gaussian(Flow(t_min=0.0))

    def mean_velocity(z: float, r: float, t: float) -> float:
        grid = torch.linspace(t, r, 201, dtype=F64)
        back = sample(RK4(variable="t"), oracle, torch.full((1, 1), z, dtype=F64), grid, Noise.from_seeds([0]))
        return (z - back.item()) / (t - r)

    assert mean_velocity(1.0, 0.0, 1.0) == pytest.approx(0.5, abs=1e-8)
    v, h = oracle.velocity(torch.ones(1, 1, dtype=F64), scalar(0.7)).item(), 1e-3
    assert v == pytest.approx(1.2195122, abs=5e-8)
    # du/dt along the path by the difference of fourth order.
    one, two = (mean_velocity(1 + k * h * v, 0.2, 0.7 + k * h) - mean_velocity(1 - k * h * v, 0.2, 0.7 - k * h)
                for k in (1, 2))
    along = (8 * one - two) / (12 * h)
    assert mean_velocity(1.0, 0.2, 0.7) + 0.5 * along == pytest.approx(v, abs=1e-8)


# Learned weighting


def test_a_fresh_uncertainty_changes_no_loss() -> None:
    noise = Noise.from_seeds(list(range(6)))
    x0, module = noise.normal((2, 3), "data"), Learned().build(Flow())

    def network(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        return 0.5 * x

    def weighed(x: Tensor, level: Tensor, cond: Cond) -> Weighed:
        return Weighed(0.5 * x, module(level))

    fresh = objective(UniformTimes(), Learned())(weighed, x0, NOTHING, noise)
    assert torch.equal(fresh, objective(UniformTimes(), EDMWeight())(network, x0, NOTHING, noise))
    with torch.no_grad():
        module.series[0] = math.log(4)
    moved = objective(UniformTimes(), Learned())(weighed, x0, NOTHING, noise)
    torch.testing.assert_close(moved, fresh / 4 + math.log(4))
    eps, t = noise.normal((2, 3), "eps"), torch.full((6,), 0.4, dtype=F64)
    plain = objective(UniformTimes()).at(network, x0, NOTHING, t, eps)
    assert torch.equal(objective(UniformTimes(), Learned()).at(weighed, x0, NOTHING, t, eps), plain)


@pytest.mark.parametrize("schedule", [Flow(), EDM(), DDPMLinear()], ids=repr)
def test_it_learns_the_loss_at_every_noise_level(schedule: Flow) -> None:
    """Minimising loss exp(-u) + u makes exp(u) the loss, here one of 1 to 20 over the noise levels."""
    module = Uncertainty(schedule, terms=8)
    level = schedule.noise_level(schedule.trained(torch.linspace(0.001, 1, 200, dtype=F64)))
    place = (level - level[0]) / (level[-1] - level[0])
    loss = (3 * torch.cos(math.pi * place) ** 2).exp().float()
    optimizer = torch.optim.LBFGS(module.parameters(), lr=1, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        u = module(level)
        total = (loss * (-u).exp() + u).mean()
        total.backward()
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(module(level).exp(), loss, rtol=0.05, atol=0)
    assert set(module.state_dict()) == {"series"}


def test_at_unit_weight_it_is_edm2s_loss() -> None:
    """weight / exp(u) ||F - y||^2 + u, with EDM's weight 1 on F."""
    noise, diffusion = Noise.from_seeds([0, 1]), Diffusion(schedule=EDM(), prediction=EDMF())
    rule = Denoising(diffusion=diffusion, times=UniformTimes(), weighting=Learned())
    x0, u = noise.normal((3,), "data"), torch.tensor([0.3, -0.2])
    draw = rule.draw(x0, noise)
    error = rule.at(lambda x, level, cond: torch.zeros_like(x), x0, NOTHING, draw.t, draw.eps)
    got = rule.losses(lambda x, level, cond: Weighed(torch.zeros_like(x), u), x0, NOTHING, draw).total
    torch.testing.assert_close(got, error / u.exp() + u)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LossAware(bins=0),
        lambda: LossAware(memory=1),
        lambda: LossAware(floor=0),
        lambda: Learned(terms=0),
        lambda: Learned(sigma_data=0),
    ],
)
def test_nonsense_is_refused(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]


def test_cubic_times_are_four_in_five_above_the_half() -> None:
    t = Cubic().sample(U, Flow())
    assert (t > 0.5).double().mean().item() == pytest.approx(0.5 ** (1 / 3), abs=1e-4)  # .7937
    assert t.mean().item() == pytest.approx(0.75, abs=1e-6)
    assert (t.diff() > 0).all()  # the inverse of a distribution function, as strata need it


@pytest.mark.parametrize("schedule", [EDM(), Flow(), VP()], ids=repr)
def test_karras_times_fall_into_each_step_of_that_grid_equally_often(schedule: EDM) -> None:
    t = Karras().sample(U, schedule)
    grid = KarrasGrid()(10, schedule)[:-1].flip(0)  # 10 levels, the uppermost at t = 1
    counts = torch.histogram(t, torch.cat([grid[:-1] - 1e-9, grid[-1:] + 1e-9])).hist
    assert (counts - len(U) / 9).abs().max() <= 2
    assert (t.diff() > 0).all()
