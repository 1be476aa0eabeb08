from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conditional import Exact, Fixed, cond
from torch import Tensor

from ldm.composition import composed
from ldm.conditioning import Cond
from ldm.denoiser import Denoise, Denoiser, Network
from ldm.diffusion import Diffusion
from ldm.exact import F64, gaussian, scalar
from ldm.grids import Karras, Uniform
from ldm.guidance import (
    GUIDANCES,
    Autoguidance,
    ByClassifier,
    CFGZeroStar,
    ClassifierFree,
    Embedded,
    Projected,
    classifier_guided,
)
from ldm.guiding import Guidance, Guided, Helpers
from ldm.noise import Noise
from ldm.predictions import X0, V, Velocity
from ldm.samplers import DDPM, RK4, DormandPrince, Heun, prior, sample
from ldm.schedules import EDM, SCHEDULES, VE, VP, DDPMLinear, Flow, NoiseSchedule


class Gaussians:
    """The exact x0 of N(m, v), with m and v = 1 and 1/4 under the condition 1, and 0 and 5/4 under the condition 0.

    It is told EDM's noise level ln(sigma) / 4 and given c_in x, as a network is. Records the batch of each call.
    """

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        self.batches.append(len(x))
        told = cond.context[:, 0, 0].to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        sigma = (4 * level).exp().to(x.dtype).view(told.shape)
        mean, variance = told, 1.25 - told
        x = x * (sigma**2 + 0.25).sqrt()
        return (variance * x + sigma**2 * mean) / (variance + sigma**2)


def aids(network: Network, diffusion: Diffusion) -> Helpers:
    """All that any guidance asks for: a weaker model and a classifier."""
    weak = Denoiser(lambda x, level, cond: 0.5 * network(x, level, cond), diffusion)
    return Helpers(weak, lambda x, t, cond: -x.square().flatten(1).sum(1) / 2)


def edm() -> tuple[Gaussians, Denoiser]:
    network = Gaussians()
    return network, Denoiser(network, Diffusion(schedule=EDM(), prediction=X0()))


def ruled(cls: type[Guidance], scale: float) -> Guidance:
    """Any guidance, off at scale 1."""
    return cls(strength=scale - 1) if cls is ByClassifier else cls(scale=scale)  # type: ignore[call-arg]


def mean_and_std(denoise: Denoise, steps: int = 512) -> tuple[float, float]:
    """Of the result from N(0, 80^2), exactly: on these oracles the sampler is an affine map of its start."""
    x = torch.tensor([[0.0], [80.0]], dtype=F64)
    low, high = (
        sample(Heun(variable="sigma"), denoise, x, Karras()(steps, EDM()), Noise.from_seeds([0, 0])).flatten().tolist()
    )
    return low, high - low


@pytest.mark.parametrize(("scale", "mean", "std"), [(1.0, 0.99375, 0.50001), (2.0, 1.31721, 0.22364)])
def test_classifier_free_guidance_of_two_gaussians(scale: float, mean: float, std: float) -> None:
    _, denoiser = edm()
    got = mean_and_std(ClassifierFree(scale=scale)(denoiser, cond(1, 2), cond(0, 1)))
    assert got == (pytest.approx(mean, abs=5e-6), pytest.approx(std, abs=5e-6))


@pytest.mark.parametrize("cls", GUIDANCES)
def test_scale_one_is_the_condition_alone_bit_for_bit(cls: type[Guidance]) -> None:
    network, denoiser = edm()
    x, t = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)), scalar(0.1)
    guided = ruled(cls, 1.0)(denoiser, cond(1, 3), None)(x, t)
    assert network.batches == [3]
    for got, expected in zip(guided[:2], denoiser(x, t, cond(1, 3))[:2], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("cls", GUIDANCES)
@pytest.mark.parametrize("schedule", [EDM(), VP(), Flow()], ids=repr)
def test_a_guided_pair_makes_up_x_again_in_one_call(cls: type[Guidance], schedule: NoiseSchedule) -> None:
    calls = []

    def network(x: Tensor, level: Tensor, condition: Cond) -> Tensor:
        calls.append(len(x))
        return torch.tanh(x + condition.context.view(-1, 1, 1))

    diffusion = Diffusion(schedule=schedule, prediction=Velocity())
    x = torch.randn(4, 3, 5, dtype=F64, generator=torch.Generator().manual_seed(1))
    for t in (schedule.t_min, 0.3, 1.0):
        calls.clear()
        guided = ruled(cls, 3.0)(Denoiser(network, diffusion), cond(1, 4), cond(0, 1), aids(network, diffusion))
        ends = guided(x, scalar(t))
        alpha, sigma = schedule(scalar(t))
        torch.testing.assert_close(alpha * ends.x0 + sigma * ends.eps, x, rtol=1e-9, atol=1e-9)
        spared = {Autoguidance: [4, 4], ByClassifier: [4], Embedded: [4]}
        assert calls == spared.get(cls, [8]) or (cls is CFGZeroStar and not calls)


@pytest.mark.parametrize("cls", [*GUIDANCES, None])
def test_a_learned_variance_stays_the_conditions_own(cls: type[Guidance] | None) -> None:
    """At every time, pure noise included, so that a walk with it comes to its end. None: several conditions."""

    def network(x: Tensor, level: Tensor, condition: Cond) -> Tensor:
        told = condition.context.to(x.dtype)[:, :, None]
        return torch.cat([torch.tanh(x + told), torch.sin(x - told)], dim=1)

    schedule = DDPMLinear(zero_terminal_snr=True)
    diffusion = Diffusion(schedule=schedule, prediction=V(), learned_variance=True)
    denoiser = Denoiser(network, diffusion)
    noise, told, null = Noise.from_seeds([0, 1, 2]), cond(1, 3), cond(0, 1)
    both = [(told, 2.0), (cond(2, 3), 0.5)]
    helpers = aids(network, diffusion)
    guided = ruled(cls, 3.0)(denoiser, told, null, helpers) if cls else composed(denoiser, both, null)
    x = prior(schedule, (2, 3, 3), noise)
    for t in (schedule.t_min, 0.3, 1.0):
        fraction = guided(x, scalar(t)).log_var_frac
        assert fraction is not None
        torch.testing.assert_close(fraction, denoiser(x, scalar(t), told).log_var_frac)
    drawn = sample(DDPM(variance="learned"), guided, x, Uniform()(5, schedule), noise)
    assert bool(drawn.isfinite().all())


@pytest.mark.parametrize("cls", GUIDANCES)
def test_guidance_is_per_sample(cls: type[Guidance]) -> None:
    network, denoiser = edm()
    x = torch.randn(5, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    rule, helpers, t = ruled(cls, 3.0), aids(network, denoiser.diffusion), scalar(0.01)
    whole = rule(denoiser, cond(1, 5), cond(0, 5), helpers)(x, t).x0
    parts = [rule(denoiser, cond(1, n), cond(0, 1), helpers)(part, t).x0 for n, part in ((2, x[:2]), (3, x[2:]))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", GUIDANCES)
def test_guidance_without_what_it_needs_is_refused(cls: type[Guidance]) -> None:
    bare = Denoiser(Gaussians(), Diffusion(schedule=EDM(), prediction=X0()))
    if cls is Embedded:  # one call, and no null
        assert ruled(cls, 2.0)(bare, cond(1, 1), None).schedule == bare.schedule
    else:
        with pytest.raises(ValueError, match="null condition|beside the denoiser"):
            ruled(cls, 2.0)(bare, cond(1, 1), None)
    with pytest.raises(ValueError, match="scale|strength"):
        ruled(cls, -1.0)
    assert dataclasses.is_dataclass(cls)


def test_scale_zero_is_unconditional() -> None:
    network, denoiser = edm()
    x, t = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(3)), scalar(0.02)
    got = ClassifierFree(scale=0.0)(denoiser, cond(1, 3), cond(0, 1))(x, t)
    assert network.batches == [3] and torch.equal(got.x0, denoiser(x, t, cond(0, 3)).x0)


def test_the_interval_spares_calls() -> None:
    """Full is plain guidance, empty the condition; unconditional calls are made on the times inside, and no others."""
    x, noise = 80 * torch.ones(1, 1, dtype=F64), Noise.from_seeds([0])
    grid = Karras()(32, EDM())
    low, high = (grid[22] * 1.0001).item(), (grid[17] * 1.0001).item()

    def run(interval: tuple[float, float]) -> tuple[float, list[int]]:
        network, denoiser = edm()
        guided = ClassifierFree(scale=2.0, interval=interval, interval_in="t")(denoiser, cond(1, 1), cond(0, 1))
        return sample(Heun(variable="sigma"), guided, x, grid, noise).item(), network.batches

    full, empty = run((0, 1)), run((0.5, 0.5))
    assert set(full[1]) == {2} and set(empty[1]) == {1}
    _, denoiser = edm()
    assert empty[0] == sample(Heun(variable="sigma"), denoiser.bind(cond(1, 1)), x, grid, noise).item()
    assert run((low, high))[1].count(2) == 2 * 5


def test_six_steps_of_an_interval_cost_twice_six_calls_with_heun() -> None:
    """EDM2's indices 17 to 22 of 32: each grid time inside is called by the step that ends and the one that starts
    there."""
    grid, network = Karras()(32, EDM()), edm()
    sigma = [EDM()(grid[i]).sigma.item() for i in (22, 17)]
    rule = ClassifierFree(scale=2.0, interval=(sigma[0] / (1 + sigma[0]), sigma[1] / (1 + sigma[1])))
    guided = rule(network[1], cond(1, 1), cond(0, 1))
    sample(Heun(variable="sigma"), guided, torch.ones(1, 1, dtype=F64), grid, Noise.from_seeds([0]))
    assert network[0].batches.count(2) == 2 * 6
    torch.testing.assert_close(grid[[17, 22]] * 80, torch.tensor([1.609, 0.283], dtype=F64), rtol=2e-3, atol=0)


@pytest.mark.parametrize("schedule", [cls() for cls in SCHEDULES], ids=repr)
def test_an_interval_is_the_same_share_of_noise_on_every_process(schedule: NoiseSchedule) -> None:
    """.2 to .8 is sigma / alpha 1/4 to 4, the times .2 to .8 of `flow`; as times of a schedule, whatever they are."""
    x, rule = torch.ones(2, 3, dtype=F64), ClassifierFree(scale=3.0, interval=(0.2, 0.8))
    by_time = dataclasses.replace(rule, interval_in="t")
    for ratio, inside in ((0.1, False), (0.24, False), (0.26, True), (1, True), (3.9, True), (4.1, False), (9, False)):
        t, exact = schedule.time(scalar(-2 * math.log(ratio))), Exact(schedule)
        mean = {True: 3.0, False: 1.0}
        for guidance, pushed in ((rule, inside), (by_time, 0.2 <= t <= 0.8)):
            found = guidance(exact, cond(1, 2), cond(0, 1))(x, t)
            torch.testing.assert_close(found.x0, exact(x, t, cond(mean[bool(pushed)], 2)).x0)


def test_on_flow_the_share_of_noise_is_the_time_to_the_bit() -> None:
    t = torch.cat([torch.linspace(0, 1, 1001, dtype=F64), torch.rand(5000, dtype=F64)])
    alpha, sigma = Flow()(t)
    assert torch.equal(sigma / (alpha + sigma), t)


def test_rescale_gives_the_conditional_spread_back() -> None:
    _, denoiser = edm()
    x, t = 3 * torch.randn(4, 64, dtype=F64, generator=torch.Generator().manual_seed(4)), scalar(0.01)
    plain = denoiser(x, t, cond(1, 4))
    guided = {
        phi: ClassifierFree(scale=3.0, rescale=phi)(denoiser, cond(1, 4), cond(0, 1))(x, t) for phi in (0.0, 0.5, 1.0)
    }
    torch.testing.assert_close(guided[1.0].x0.std(1), plain.x0.std(1))
    torch.testing.assert_close(guided[0.5].x0, (guided[0.0].x0 + guided[1.0].x0) / 2)


def test_projected_guidance_pushes_across_only() -> None:
    _, denoiser = edm()
    x, t = torch.randn(4, 16, dtype=F64, generator=torch.Generator().manual_seed(5)), scalar(0.01)
    plain = denoiser(x, t, cond(1, 4)).x0

    def push(rule: Guidance) -> Tensor:
        return rule(denoiser, cond(1, 4), cond(0, 1))(x, t).x0 - plain

    torch.testing.assert_close(
        (push(Projected(scale=3.0)) * plain).sum(1), torch.zeros(4, dtype=F64), atol=1e-10, rtol=0
    )
    torch.testing.assert_close(push(Projected(scale=3.0, parallel=1.0)), push(ClassifierFree(scale=3.0)))
    short = push(Projected(scale=3.0, parallel=1.0, max_norm=0.1)).norm(dim=1)
    torch.testing.assert_close(short, torch.full((4,), 0.2, dtype=F64))


def test_a_guided_denoiser_hands_its_learned_variance_on() -> None:
    """Through another guidance, also where that one stands still and would not call it otherwise."""
    schedule = DDPMLinear(zero_terminal_snr=True)

    def network(x: Tensor, level: Tensor, condition: Cond) -> Tensor:
        return torch.cat([torch.tanh(x), torch.sin(x + condition.context.to(x.dtype))], dim=1)

    denoiser = Denoiser(network, Diffusion(schedule=schedule, prediction=V(), learned_variance=True))
    inner = Guided(ClassifierFree(scale=2.0), denoiser, cond(0, 1))
    assert not Exact(schedule).learned_variance
    x = torch.ones(2, 3, 1, dtype=F64)
    for t in (scalar(0.5), scalar(1.0)):
        fraction = CFGZeroStar(scale=3.0)(inner, cond(1, 2), cond(0, 1))(x, t).log_var_frac
        assert fraction is not None
        torch.testing.assert_close(fraction, denoiser(x, t, cond(1, 2)).log_var_frac)


def test_cfg_zero_star() -> None:
    """With an unconditional velocity that is a multiple of the conditional one, guidance has nothing left to add."""

    def network(x: Tensor, level: Tensor, condition: Cond) -> Tensor:
        return torch.ones_like(x) * (0.5 + condition.context.view(-1, 1))

    denoiser = Denoiser(network, Diffusion(schedule=Flow(), prediction=Velocity()))
    x = torch.randn(2, 4, dtype=F64, generator=torch.Generator().manual_seed(6))
    guided = CFGZeroStar(scale=5.0)(denoiser, cond(1, 2), cond(0, 1))
    torch.testing.assert_close(guided(x, scalar(0.5)).x0, denoiser(x, scalar(0.5), cond(1, 2)).x0)
    still = guided(x, scalar(1.0))
    torch.testing.assert_close(still.eps - still.x0, torch.zeros_like(x))


@pytest.mark.parametrize("schedule", [cls() for cls in SCHEDULES], ids=repr)
def test_cfg_zero_star_is_the_same_on_every_process(schedule: NoiseSchedule) -> None:
    """As on `flow` at w = sigma / (alpha + sigma), x / (alpha + sigma): the guided pair, standing still included."""
    x, flow = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(6)), Flow()
    for ratio in (0.3, 2.0, 9.0):
        t = schedule.time(scalar(-2 * math.log(ratio)))
        alpha, sigma = schedule(t)
        for zero_from in (2.0, 1e-3):
            here, there = (
                CFGZeroStar(scale=3.0, zero_from=zero_from)(Exact(process), cond(1, 3), cond(0, 1))
                for process in (schedule, flow)
            )
            found, wanted = here(x * (alpha + sigma), t), there(x, sigma / (alpha + sigma))
            for got, expected in zip(found[:2], wanted[:2], strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
            assert zero_from > 1 or torch.equal(found.x0, found.eps)


@pytest.mark.parametrize(
    ("schedule", "rule", "off"),
    [
        (EDM(), CFGZeroStar(scale=3), 0.005),
        (VE(), CFGZeroStar(scale=3), 0.005),
        (EDM(), CFGZeroStar(scale=3, zero_from=0.97), 0.02),
        (EDM(), CFGZeroStar(scale=3, zero_from=0.4, zero_in="t"), 0.02),
    ],
)
def test_cfg_zero_star_keeps_the_spread_of_data_that_no_condition_moves(
    schedule: NoiseSchedule, rule: Guidance, off: float
) -> None:
    """.5, but for what a stillness at sigma 32 and more, or in the first of the steps, leaves undone."""
    guided = rule(Exact(schedule), cond(0, 2), cond(0, 1))
    grid, ends = Karras()(64, schedule), torch.tensor([[0.0], [1.0]], dtype=F64) * schedule.prior_std
    low, high = sample(Heun(variable="sigma"), guided, ends, grid, Noise.from_seeds([0, 0])).flatten().tolist()
    assert high - low == pytest.approx(0.5, abs=off) and low == 0


@pytest.mark.parametrize("schedule", [cls() for cls in SCHEDULES], ids=repr)
def test_cfg_zero_star_stands_still_on_shares_of_noise(schedule: NoiseSchedule) -> None:
    """From sigma / (alpha + sigma) .6 on, on every process; in t, at other levels; and at t = 1 in both units."""
    x, denoiser = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(6)), Exact(schedule)

    def still(t: Tensor, **settings: object) -> bool:
        ends = CFGZeroStar(scale=3.0, **settings)(denoiser, cond(1, 3), cond(0, 1))(x, t)  # type: ignore[arg-type]
        return torch.equal(ends.x0, ends.eps)

    for share in (0.4, 0.59, 0.61, 0.8):
        t = schedule.time(scalar(2 * math.log((1 - share) / share)))
        assert still(t, zero_from=0.6) == (share > 0.6)
        assert still(t, zero_from=0.6, zero_in="t") == (t.item() >= 0.6)
    assert still(scalar(1.0)) and still(scalar(1.0), zero_in="t") and not still(scalar(1.0), zero_from=1.1)
    assert not still(scalar(0.99))


BENT = [ClassifierFree(scale=3.0, rescale=0.7), Projected(scale=3.0), Projected(scale=3.0, parallel=0.5, max_norm=0.1)]


@pytest.mark.parametrize("rule", BENT, ids=repr)
def test_guidance_is_finite_and_continuous_where_there_is_no_noise(rule: Guidance) -> None:
    """At sigma = 0, where eps is nothing that x0 could be turned into: the limit from t above, and finite samples."""

    def network(x: Tensor, level: Tensor, condition: Cond) -> Tensor:
        return torch.sin(3 * x + condition.context[:, 0])

    denoiser = Denoiser(network, Diffusion(schedule=Flow(t_min=0.0), prediction=Velocity()))
    guided = rule(denoiser, cond(1, 3), cond(0, 1))
    x = 0.7 + torch.randn(3, 6, dtype=F64, generator=torch.Generator().manual_seed(6))
    landed, near = guided(x, scalar(0.0)), guided(x, scalar(1e-7))
    for got, expected in zip(landed[:2], near[:2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(landed.x0, x)
    inside = guided(x, scalar(0.3))
    torch.testing.assert_close(0.7 * inside.x0 + 0.3 * inside.eps, x)
    assert not torch.allclose(landed.eps, denoiser(x, scalar(0.0), cond(1, 3)).eps)
    grid, noise = Uniform()(6, Flow(t_min=0.0)), Noise.from_seeds([0, 1, 2])
    for sampler in (Heun(), RK4(variable="t"), DormandPrince()):
        assert bool(sample(sampler, guided, x, grid, noise).isfinite().all()), sampler


def test_autoguidance() -> None:
    strong, weak = Fixed(gaussian(EDM(), 0.5)), Fixed(gaussian(EDM(), 0.8))
    x, t = torch.ones(1, 1, dtype=F64), scalar(0.01)
    got = Autoguidance(scale=2.0)(strong, cond(1, 1), None, Helpers(weak))(x, t)
    torch.testing.assert_close(got.x0, 2 * strong.oracle(x, t).x0 - weak.oracle(x, t).x0)
    with pytest.raises(ValueError, match="one schedule"):
        Autoguidance(scale=2.0)(strong, cond(1, 1), None, Helpers(Fixed(gaussian(Flow()))))


def test_guidance_by_a_classifier_hears_the_condition() -> None:
    _, denoiser = edm()
    x, t, told = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(7)), scalar(0.02), cond(1, 3)

    def log_prob(x: Tensor, t: Tensor, condition: Cond) -> Tensor:
        return (x * condition.context[:, 0]).sum(1)

    judged = classifier_guided(denoiser.bind(told), lambda x, t: log_prob(x, t, told), 0.7)
    found = ByClassifier(strength=0.7)(denoiser, told, None, Helpers(log_prob=log_prob))(x, t)
    assert torch.equal(found.x0, judged(x, t).x0) and not torch.equal(found.x0, denoiser(x, t, told).x0)


@pytest.mark.parametrize(("scale", "mean"), [(1.0, 0.496875), (2.0, 0.99375)])
def test_classifier_guidance(scale: float, mean: float) -> None:
    """p(y | x) ~ e^(2x) on G(.5) is N(.5, .25) in the limit; at sigma_max 80 the mean falls short by that start."""
    oracle = gaussian(EDM())

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        return 2 * x[:, 0] * (0.25 / (0.25 + EDM()(t).sigma ** 2))

    assert mean_and_std(classifier_guided(oracle, log_prob, scale))[0] == pytest.approx(mean, abs=2e-6)


def test_classifier_guidance_from_pure_noise_is_finite() -> None:
    guided = classifier_guided(gaussian(Flow()), lambda x, t: 2 * x[:, 0], 1.0)
    noise = Noise.from_seeds([0, 1])
    drawn = sample(Heun(), guided, prior(Flow(), (1,), noise, dtype=F64), Uniform()(8, Flow()), noise)
    assert bool(drawn.isfinite().all()) and math.isfinite(guided(drawn, scalar(1.0)).x0.sum().item())


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClassifierFree(interval=(0.6, 0.5)),
        lambda: ClassifierFree(interval=(0.0, 1.5)),
        lambda: ClassifierFree(rescale=2),
        lambda: ClassifierFree(interval_in="log-snr"),  # type: ignore[arg-type]
        lambda: Projected(max_norm=-1),
        lambda: CFGZeroStar(zero_from=0),
        lambda: CFGZeroStar(zero_in="log-snr"),  # type: ignore[arg-type]
        lambda: ClassifierFree(scale=math.nan),
        lambda: ByClassifier(strength=-1),
        lambda: Autoguidance(scale=-1),
    ],
)
def test_nonsense_is_refused(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]
