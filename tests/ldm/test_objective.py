from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm import weighting
from ldm.conditioning import Cond
from ldm.diffusion import Diffusion
from ldm.exact import F64
from ldm.noise import Noise
from ldm.objectives import Denoising
from ldm.predictions import EDMF, PREDICTIONS, X0, Eps, Score, V, Velocity
from ldm.schedules import EDM, SCHEDULES, VE, VP, DDPMLinear, Flow, NoiseSchedule, Table
from ldm.times import TIMES, LogitNormal, LogNormal, TimeSampling, UniformTimes, shifted
from ldm.weighting import WEIGHTINGS, Weighting

ALL: list[NoiseSchedule] = [cls() for cls in SCHEDULES] + [
    cls(zero_terminal_snr=True) for cls in SCHEDULES if issubclass(cls, Table)
]  # type: ignore[call-arg]
each = pytest.mark.parametrize("schedule", ALL, ids=repr)
NOTHING = Cond(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
U = (torch.arange(4096, dtype=F64) + 0.5) / 4096


def processes(schedule: NoiseSchedule) -> list[Diffusion]:
    """With every prediction that a schedule allows."""
    allowed = (cls() for cls in PREDICTIONS if cls().refusal(schedule) is None)
    return [Diffusion(schedule=schedule, prediction=prediction) for prediction in allowed]


@each
@pytest.mark.parametrize("times", [cls() for cls in TIMES], ids=repr)
def test_drawn_times_can_be_trained_at(times: TimeSampling, schedule: NoiseSchedule) -> None:
    t, factor = times.draw(U, schedule)
    assert torch.equal(factor, torch.ones_like(U))
    assert t.dtype == F64 and t.min() >= schedule.t_min and t.max() <= 1
    if isinstance(schedule, Table):
        torch.testing.assert_close(t * schedule.steps, (t * schedule.steps).round(), rtol=0, atol=1e-9)


def test_the_distributions() -> None:
    torch.testing.assert_close(UniformTimes().sample(U, Flow()), U)
    counts = torch.bincount((UniformTimes().sample(U, DDPMLinear(steps=8)) * 8).round().long())
    assert counts.tolist() == [0] + [512] * 8
    logits = torch.logit(LogitNormal(mean=-0.4, std=0.7).sample(U, Flow()))
    assert logits.mean().item() == pytest.approx(-0.4, abs=1e-6) and logits.std().item() == pytest.approx(0.7, abs=2e-3)
    logs = (80 * LogNormal().sample(U, EDM())).log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=1e-3) and logs.std().item() == pytest.approx(1.2, abs=5e-3)


def test_shift_three() -> None:
    t = torch.tensor([0.25, 0.5, 0.75], dtype=F64)
    torch.testing.assert_close(shifted(t, 3, Flow()), torch.tensor([0.5, 0.75, 0.9], dtype=F64))
    torch.testing.assert_close(Flow().logsnr(shifted(t, 3, Flow())), Flow().logsnr(t) - 2 * math.log(3))
    torch.testing.assert_close(UniformTimes(shift=3).sample(U, Flow()), shifted(U, 3, Flow()))
    torch.testing.assert_close(LogitNormal(shift=3).sample(U, Flow()), LogitNormal(mean=math.log(3)).sample(U, Flow()))


@each
@pytest.mark.parametrize("rule", [cls() for cls in WEIGHTINGS], ids=repr)
def test_weights_are_finite_and_not_negative_everywhere(rule: Weighting, schedule: NoiseSchedule) -> None:
    for diffusion in processes(schedule):
        weights = rule(diffusion, torch.linspace(max(diffusion.schedule.t_min, 1e-5), 1, 101, dtype=F64))
        assert bool(weights.isfinite().all()) and bool((weights >= 0).all()), diffusion


@each
@pytest.mark.parametrize("rule", [cls() for cls in WEIGHTINGS if cls is not weighting.UniformWeight], ids=repr)
def test_a_weighting_means_the_same_for_every_prediction(rule: Weighting, schedule: NoiseSchedule) -> None:
    """The same pair of ends, in error by the same amount, costs the same whatever the network was asked for."""
    t = torch.linspace(0.05, 0.95, 7, dtype=F64)
    alpha, sigma = schedule(t)
    wrong_x0 = torch.ones(7, 1, dtype=F64)
    wrong_eps = -(alpha / sigma)[:, None] * wrong_x0
    costs = []
    for diffusion in processes(schedule):
        error = diffusion.target(wrong_x0, wrong_eps, t)
        costs.append(rule(diffusion, t) * error[:, 0] ** 2)
    for cost in costs:
        torch.testing.assert_close(cost, costs[0], rtol=1e-9, atol=0)


def test_the_published_weights() -> None:
    t = torch.linspace(0.02, 0.98, 9, dtype=F64)
    snr = VP().logsnr(t).exp()

    def weights(rule: Weighting, prediction: object, schedule: NoiseSchedule = VP()) -> Tensor:  # noqa: B008
        return rule(Diffusion(schedule=schedule, prediction=prediction), t)  # type: ignore[arg-type]

    torch.testing.assert_close(weights(weighting.SNR(), X0()), snr)
    torch.testing.assert_close(weights(weighting.MinSNR(), X0()), snr.clamp(max=5))
    torch.testing.assert_close(weights(weighting.MinSNR(), Eps()), snr.clamp(max=5) / snr)
    torch.testing.assert_close(weights(weighting.MinSNR(), V()), snr.clamp(max=5) / (snr + 1))
    torch.testing.assert_close(weights(weighting.SoftMinSNR(), X0()), 4 * snr / (snr + 4))
    torch.testing.assert_close(weights(weighting.P2(), Eps()), 1 / (1 + snr))
    torch.testing.assert_close(weights(weighting.Sigmoid(bias=-2), Eps()), torch.sigmoid(-2 - snr.log()))
    torch.testing.assert_close(weights(weighting.ELBO(), Velocity(), Flow()), (1 - t) / t)
    grown = (VP().logsnr(t + 1e-6) - VP().logsnr(t - 1e-6)) / 2e-6
    torch.testing.assert_close(weights(weighting.ELBO(), Eps()), -grown / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights(weighting.EDMWeight(), EDMF(), EDM()), torch.ones_like(t))
    at_half = torch.tensor([0.5 / 80], dtype=F64)
    of_x0 = weighting.EDMWeight()(Diffusion(schedule=EDM(), prediction=X0()), at_half)
    assert of_x0.item() == pytest.approx(8, abs=1e-9)


def objective(diffusion: Diffusion, rule: Weighting | None = None) -> Denoising:
    return Denoising(diffusion=diffusion, times=UniformTimes(), weighting=rule or weighting.UniformWeight())


def test_the_loss_of_a_sample_depends_on_its_seed_alone() -> None:
    loss = objective(Diffusion(schedule=Flow(), prediction=Velocity()))
    x0, noise = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0)), Noise.from_seeds(list(range(6)))

    def network(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        return x * (level.float() / 1000).view(-1, 1, 1, 1)

    whole = loss(network, x0, NOTHING, noise)
    assert whole.shape == (6,) and whole.dtype == torch.float32
    torch.testing.assert_close(
        torch.cat([loss(network, x0[:2], NOTHING, noise[:2]), loss(network, x0[2:], NOTHING, noise[2:])]),
        whole,
        rtol=1e-6,
        atol=1e-7,
    )


def test_the_loss_at_given_times_is_the_error_of_the_target() -> None:
    diffusion = Diffusion(schedule=VP(), prediction=V())
    x0, eps = torch.ones(2, 3, 1, 1), torch.full((2, 3, 1, 1), 2.0)
    t = torch.tensor([0.2, 0.9], dtype=F64)
    loss = objective(diffusion).at(lambda x, level, cond: torch.zeros_like(x), x0, NOTHING, t, eps)
    alpha, sigma = VP()(t)
    torch.testing.assert_close(loss, (2 * alpha - sigma).float() ** 2)


def test_the_weight_multiplies_the_loss() -> None:
    diffusion, noise = Diffusion(schedule=VP(), prediction=Eps()), Noise.from_seeds([5, 6])
    x0 = torch.ones(2, 1, 2, 2)

    def silent(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        return torch.zeros_like(x)

    t = UniformTimes().sample(noise.uniform((), "time"), VP())
    plain, weighted = (objective(diffusion, rule)(silent, x0, NOTHING, noise) for rule in (None, weighting.P2()))
    torch.testing.assert_close(weighted, plain * weighting.P2()(diffusion, t).float())


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 1.0])
def test_denoising_score_matching_is_least_at_the_true_score(t: float) -> None:
    """NCSN's loss, weight sigma^2: 1/2 ||sigma s(x_t) + eps||^2 is half of ours, and on G(1) its gradient is 0 at
    s = -x / (1 + sigma^2). Exactly: four points have the moments of (x0, eps) that a quadratic sees."""
    diffusion, root = Diffusion(schedule=VE(), prediction=Score()), 2**0.5
    x0 = torch.tensor([[root], [-root], [0.0], [0.0]], dtype=F64)
    eps, times = x0.flip(0), torch.full((4,), max(t, VE().t_min), dtype=F64)
    sigma = VE()(times).sigma[0].item()
    slope = torch.tensor(-1 / (1 + sigma**2), dtype=F64, requires_grad=True)
    seen = []

    def network(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        seen.append(slope * x / VE().input_scale(times)[:, None])
        return seen[-1]

    error = objective(diffusion).at(network, x0, NOTHING, times, eps)
    loss = weighting.SNR()(diffusion, times).float() * error
    torch.testing.assert_close(loss / 2, 0.5 * (sigma * seen[0] + eps).square().mean(1).float())
    (gradient,) = torch.autograd.grad(loss.mean(), slope)
    scale = (sigma * seen[0].detach()).abs().max().item() * (1 + sigma**2)
    assert abs(gradient.item()) < 1e-6 * scale


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogitNormal(std=0),
        lambda: UniformTimes(shift=0),
        lambda: LogitNormal(shift=-1),
        lambda: LogNormal(std=-1),
        lambda: weighting.MinSNR(gamma=0),
        lambda: weighting.P2(k=0),
        lambda: weighting.SoftMinSNR(gamma=-1),
        lambda: weighting.EDMWeight(sigma_data=0),
        lambda: weighting.P2(gamma=-1),
        lambda: EDMF(sigma_data=0),
    ],
)
def test_nonsense_is_refused(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]


@each
def test_what_is_lost_on_an_answer_is_the_distance_to_it(schedule: NoiseSchedule) -> None:
    """With every prediction: weight(t) ||mine - theirs||^2 at the same noisy latents, and for who answered nothing."""
    noise = Noise.from_seeds(list(range(5)))
    x0 = noise.normal((2, 4, 4), "x0", dtype=F64)
    seen: list[Tensor] = []

    def theirs(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        seen.append(x)
        return torch.sin(3 * x) + 1

    def mine(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        seen.append(x)
        return torch.cos(x)

    for diffusion in processes(schedule):
        loss = objective(diffusion, weighting.P2())
        draw = loss.draw(x0, noise)._replace(t=torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=F64))
        seen.clear()
        latents, told = loss.answered(theirs, x0, NOTHING, draw)
        assert loss.losses(theirs, latents, NOTHING, told).total.max() < 1e-9
        lost = loss.losses(mine, latents, NOTHING, told).total
        torch.testing.assert_close(seen[2], seen[0], rtol=1e-9, atol=1e-9)
        error = (torch.sin(3 * seen[0]) + 1 - torch.cos(seen[0])).square().flatten(1).mean(1)
        torch.testing.assert_close(lost, (loss.weighting(diffusion, draw.t) * error).float(), rtol=1e-5, atol=1e-8)
        assert torch.equal(told.t, draw.t) and torch.equal(told.factor, draw.factor)


def test_an_answer_teaches_no_variance() -> None:
    loss = objective(Diffusion(schedule=DDPMLinear(), prediction=Eps(), learned_variance=True))
    draw = loss.draw(x0 := torch.zeros(1, 1, 2, 2), Noise.from_seeds([0]))
    with pytest.raises(ValueError, match="a learned variance is that of data around the answer"):
        loss.answered(lambda x, level, cond: torch.cat([x, x], 1), x0, NOTHING, draw)
