"""Distribution matching against exact answers: the gradient of a KL divergence between Gaussians, and whose turn it is.
"""

from __future__ import annotations

import math

import pytest
import torch
from few_step import Data, Exact, at, network, nothing, values
from matching import FLOW, OTHER, REAL, TEACHER, Affine, Linear, compared, denoising, objective, quadrature
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion import Denoised, Diffusion
from ldm.exact import F64
from ldm.jumps import BoundJump, noise_share
from ldm.noise import Noise
from ldm.objectives import ALONE, Beside
from ldm.objectives.base import Trained
from ldm.objectives.distribution import DMD, FAKE, DMDConfig, direction
from ldm.objectives.few_step import WALK
from ldm.pairing import Independent
from ldm.predictions import PREDICTIONS, Velocity
from ldm.samplers import ConsistencySampler, sample
from ldm.schedules import SCHEDULES, NoiseSchedule, match
from ldm.teacher import Teacher
from ldm.times import LossAware, UniformTimes
from ldm.weighting import SNR, Learned, UniformWeight


@pytest.mark.parametrize(("x", "eps", "real", "fake", "score", "normalised"), [
    (0.5, 0.3, 0.892, 0.4950820, -1.4884426, -1.0125460),
    (1.2, -1, 0.832, 0.3967213, -1.6322951, -1.1828226),
])
def test_the_direction_of_two_gaussians(x: float, eps: float, real: float, fake: float, score: float,
                                        normalised: float) -> None:
    """Real N(1, .25), fake N(.2, .64) at alpha .6, sigma .4. Going against the direction, x goes from fake to real."""
    clean, noise, t = values(x), values(eps), at(0.4)
    x_t = Diffusion(schedule=FLOW, prediction=Velocity()).perturb(clean, noise, t)
    ends = [data.denoised(x_t, t) for data in (REAL, OTHER)]
    assert [end.x0.item() for end in ends] == pytest.approx([real, fake], abs=1e-7)
    assert (-(ends[1].eps - ends[0].eps) / 0.4).item() == pytest.approx(score, abs=1e-7)  # s = -eps / sigma
    assert (0.6 / 0.4**2 * (ends[1].x0 - ends[0].x0)).item() == pytest.approx(score, abs=1e-7)
    assert direction(clean, ends[1].x0, ends[0].x0).item() == pytest.approx(normalised, abs=1e-7)
    made = objective()
    generator = Affine(x, 0)  # makes x of any noise
    losses = made.losses(generator, values(9), nothing(1), compared(values(0.7), t, noise),
                         Beside(networks={FAKE: denoising(OTHER)}, teacher=TEACHER))
    losses.total.sum().backward()
    assert generator.mean.grad is not None and generator.mean.grad.item() == pytest.approx(normalised, abs=1e-7)
    assert losses.total.item() == losses.seen.item() == pytest.approx(normalised**2 / 2, abs=1e-6)
    assert losses.total.dtype == torch.float32 and list(losses.parts) == ["matching"]


def divergence(mean: float, std: float, alpha: float = 0.6, sigma: float = 0.4) -> float:
    """KL(fake || real), both noised: of N(mean, std^2) from N(1, .25)."""
    v, real = (alpha * std) ** 2 + sigma**2, alpha**2 * 0.25 + sigma**2
    return 0.5 * (v / real - 1 - math.log(v / real) + (alpha * (mean - 1)) ** 2 / real)


def test_without_its_normaliser_it_is_the_gradient_of_the_divergence() -> None:
    """By quadrature over z and eps through the objective itself, by closed form and by finite differences."""
    (draw, weight), generator = quadrature(8), Affine()
    beside = Beside(networks={FAKE: denoising(OTHER)}, teacher=TEACHER)
    losses = objective().losses(generator, draw.eps, nothing(64), draw, beside)
    x = 0.2 + 0.8 * draw.eps
    real = REAL.denoised(0.6 * x + 0.4 * draw.more["diffusing"], draw.more["time"]).x0
    (losses.total * weight * (x - real).abs()[:, 0] * 0.6**2 / 0.4**2).sum().backward()
    gradients = [p.grad.item() for p in (generator.mean, generator.std) if p.grad is not None]
    h = 1e-5
    by_differences = [(divergence(0.2 + a * h, 0.8 + b * h) - divergence(0.2 - a * h, 0.8 - b * h)) / (2 * h)
                      for a, b in ((1, 0), (0, 1))]
    assert gradients == pytest.approx([-1.152, 0.4142951], abs=1e-6)
    assert by_differences == pytest.approx([-1.152, 0.4142951], abs=1e-7)


@pytest.mark.parametrize("schedule", [kind() for kind in SCHEDULES], ids=repr)
def test_of_the_same_two_it_is_exactly_nothing(schedule: NoiseSchedule) -> None:
    """On every process, for every prediction that it allows, at drawn times."""
    noise, data = Noise.from_seeds(range(32)), Data(schedule, 0.5, 0.3)
    for prediction in (kind() for kind in PREDICTIONS if kind().refusal(schedule) is None):
        made = objective(schedule, prediction)
        draw, cond = made.draw(torch.zeros(32, 3, dtype=F64), noise), nothing(32)
        # What the denoiser of pure noise answers: x0 with a spread of nothing is no sample, but that is none's fault.
        generator, fake = denoising(data, prediction), denoising(data, prediction)

        class Answered(Exact):
            def __call__(self, x: Tensor, t: Tensor, cond: Cond, made: DMD = made, fake: Trained = fake) -> Denoised:
                return made.jump(fake, x, t, t, cond)[0]

        beside = Beside(networks={FAKE: fake}, teacher=Teacher(Answered(data)))
        losses = made.losses(generator, draw.eps, cond, draw, beside)
        assert torch.equal(losses.total, torch.zeros(32))
        other = Beside(networks={FAKE: denoising(Data(schedule, 0.6, 0.3), prediction)}, teacher=beside.teacher)
        assert made.losses(generator, draw.eps, cond, draw, other).total.min() > 0
        # And a perfect fake network of what the generator makes would cost what the posterior's width is.
        late = other._replace(step=1, bare=lambda x, level, cond, g=generator: g(x, level, cond))
        assert made.losses(generator, draw.eps, cond, draw, late).total.isfinite().all()


def test_the_scale_of_the_gradient_in_a_sample_of_many_numbers() -> None:
    """The direction over the count of numbers, normalised by the mean of each sample alone."""
    x = torch.randn(2, 3, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    free = x.clone().requires_grad_()
    made, t, eps = objective(regression=0.5), at(0.4, 0.7), x.flip(2)

    def generator(given: Tensor, level: Tensor, cond: Cond) -> Tensor:
        return given - free

    draw = compared(x.flip(3), t, eps)
    beside = Beside(networks={FAKE: denoising(OTHER)}, teacher=TEACHER)
    losses = made.losses(generator, x, nothing(2), draw, beside)
    losses.parts["matching"].sum().backward(retain_graph=True)
    x_t = made.diffusion.perturb(x, eps, t)
    fake, real = OTHER.denoised(x_t, t).x0, REAL.denoised(x_t, t).x0
    pull = torch.stack([(fake[i] - real[i]) / (x[i] - real[i]).abs().mean() for i in range(2)])
    torch.testing.assert_close(free.grad, pull / 48, rtol=1e-7, atol=1e-12)
    # And so the other part counts as it says: half the mean square distance to the teacher's sample of the same noise.
    ends = TEACHER.walk(draw.eps, at(1.0, 1.0), nothing(2), WALK)
    torch.testing.assert_close(losses.parts["regression"], 0.5 * (x - ends).square().mean((1, 2, 3)).float())
    free.grad = None
    losses.parts["regression"].sum().backward(retain_graph=True)
    torch.testing.assert_close(free.grad, (x - ends) / 48, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(losses.total, losses.parts["matching"] + losses.parts["regression"])


def test_a_later_step_is_held_to_the_teachers_way_from_there() -> None:
    made, generator = objective(steps=2, regression=2.0), Affine()
    again = torch.full((2, 1, 1), -0.7, dtype=F64)
    draw = compared(values(0.3, 0.3), at(0.4, 0.4), values(1, 1), step=at(0, 1), again=again)
    beside = Beside(bare=generator, networks={FAKE: denoising(OTHER)}, teacher=TEACHER)
    found = made.losses(generator, draw.eps, nothing(2), draw, beside).parts["regression"]
    first = 0.2 + 0.8 * 0.3
    x, t = values(0.3, 0.5 * first - 0.5 * 0.7), at(1.0, 0.5)
    end = x - match(t, x) * (x - (0.2 + 0.8 * x))  # as `Affine` has the velocity at any time
    wanted = 2 * (end - TEACHER.walk(x, t, nothing(2), WALK)).square()[:, 0]
    torch.testing.assert_close(found, wanted.float())


def test_turns() -> None:
    config = DMDConfig(fake_steps=3, fake_rate=2.0)
    assert [config.generates(step) for step in range(9)] == [True, *[False] * 3, True, *[False] * 3, True]
    assert [DMDConfig().generates(step) for step in range(7)] == [True, *[False] * 5, True]
    (companion,) = config.companions().values()
    assert list(config.companions()) == [FAKE] and companion.kept is None and companion.rate == 2


@pytest.mark.parametrize("steps", [1, 3])
def test_who_learns_in_which_turn(steps: int) -> None:
    """One call of the wrapped generator in its own turn and none in the others, and gradients of one network alone."""
    made, noise = objective(steps=steps, fake_steps=1), Noise.from_seeds(range(8))

    class Fake(Linear):
        def forward(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
            assert torch.is_grad_enabled() != made.config.generates(step)  # else a process wrapper waits for gradients
            return super().forward(x, level, cond)

    wrapped, fake = Affine(), Fake()
    own: list[bool] = []

    def bare(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        own.append(torch.is_grad_enabled())
        return wrapped.forward(x, level, cond)

    class Weighted(Exact):
        weight = torch.ones((), dtype=F64, requires_grad=True)

        def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
            assert made.config.generates(step)
            return self.data.denoised(x * self.weight, t)

    for step in range(4):
        wrapped.calls.clear()
        own.clear()
        draw = made.draw(torch.zeros(8, 1, dtype=F64), noise.fold(step))
        beside = Beside(step, 4, bare, {FAKE: fake}, Teacher(Weighted(REAL)))
        losses = made.losses(wrapped, torch.full((8, 1), torch.nan, dtype=F64), nothing(8), draw, beside)
        losses.total.mean().backward()
        mine = step % 2 == 0
        assert len(wrapped.calls) - len(own) == mine and not any(own) and len(own) == steps - mine
        assert (wrapped.mean.grad is not None) == mine and (fake.coefficients.grad is None) == mine
        for part in (wrapped, fake):
            part.zero_grad(set_to_none=True)
    assert Weighted.weight.grad is None
    with pytest.raises(ValueError, match="--teacher"):
        made.losses(wrapped, draw.eps, nothing(8), draw, ALONE)


def test_what_the_fake_network_learns() -> None:
    """The loss of a denoiser on what the generator makes: a perfect one's is what no denoiser knows, the posterior's
    width, and others' is that and their own error."""
    made, count = objective(), 1 << 14
    noise = Noise.from_seeds(range(count))
    draw, generator = made.draw(torch.zeros(count, 1, dtype=F64), noise), Affine()
    t, eps = draw.more["time"], draw.more["diffusing"]

    def cost(data: Data) -> Tensor:
        beside = Beside(1, 2, generator, {FAKE: denoising(data)})
        return made.losses(generator, eps, nothing(count), draw, beside).total

    x = 0.2 + 0.8 * draw.eps
    x_t = (1 - t)[:, None] * x + t[:, None] * eps
    off = (OTHER.denoised(x_t, t).eps - OTHER.denoised(x_t, t).x0 - (eps - x)).square()[:, 0]
    torch.testing.assert_close(cost(OTHER), off.float(), rtol=1e-5, atol=1e-7)
    width = 0.64 / ((1 - t) ** 2 * 0.64 + t**2)  # of eps - x0 given x_t: std^2 / V
    assert cost(OTHER).mean().item() == pytest.approx(width.mean().item(), rel=0.05)
    assert cost(REAL).mean() > cost(OTHER).mean() + 0.1 and cost(Data(FLOW, 0.7, 0.2)).mean() > cost(OTHER).mean()
    weighed = DMDConfig().build(diffusion=made.diffusion, times=UniformTimes(), weighting=SNR(), pairing=Independent())
    beside = Beside(1, 2, generator, {FAKE: denoising(OTHER)})
    losses = weighed.losses(generator, eps, nothing(count), draw, beside)
    torch.testing.assert_close(losses.total, off.float() * (1 - t).float() ** 2, rtol=1e-5, atol=1e-6)
    assert list(losses.parts) == ["fake"]


@pytest.mark.parametrize("schedule", [kind() for kind in SCHEDULES], ids=repr)
def test_times_lie_between_two_shares_of_noise(schedule: NoiseSchedule) -> None:
    prediction = next(kind() for kind in PREDICTIONS if kind().refusal(schedule) is None)
    draw = objective(schedule, prediction, low=0.1, high=0.6).draw(torch.zeros(4000, 1), Noise.from_seeds(range(4000)))
    share = noise_share(schedule, draw.more["time"])
    assert share.min() > 0.098 and share.max() < 0.602  # a table rounds
    quarters = torch.tensor([0.225, 0.35, 0.475], dtype=F64)
    torch.testing.assert_close(share.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=F64)), quarters, rtol=0, atol=0.02)
    # None of the numbers of a sample is another's: as many draws, as many keys.
    drawn_eps = torch.cat([draw.eps, draw.more["diffusing"], draw.t[:, None], draw.more["time"][:, None]], 1)
    assert torch.corrcoef(drawn_eps.T).fill_diagonal_(0).abs().max() < 0.06


def test_several_steps_are_given_what_the_sampler_walks() -> None:
    """At each time of the grid, the sample that the sampler `consistency` has there, with the same noise."""
    steps, count = 3, 12
    made, data = objective(steps=steps), Data(FLOW, 0.5, 0.3)
    draw = made.draw(torch.zeros(count, 2, dtype=F64), Noise.from_seeds(range(count)))
    generator = network(made.config, data)  # the exact map to the clean end
    given, times = made.given(nothing(count), draw, Beside(bare=generator))

    class Recorded(Noise):
        def fold(self, *key: object) -> Noise:
            return self

        def normal(self, shape: object, *key: object, dtype: object = F64) -> Tensor:
            return draw.more["again"][:, len(walked) - 1]

    walked: list[Tensor] = []

    def asked(x: Tensor, t: Tensor, s: Tensor) -> Denoised:
        walked.append(x)
        return data.jump(x, t.expand(len(x)), s.expand(len(x)))

    grid = torch.arange(steps, -1, -1, dtype=F64) / steps
    sample(ConsistencySampler(), BoundJump(FLOW, asked), draw.eps, grid, Recorded(torch.arange(count)))
    place = draw.more["step"].long()
    assert sorted(set(place.tolist())) == [0, 1, 2]
    torch.testing.assert_close(times, grid[place])
    torch.testing.assert_close(given, torch.stack(walked)[place, torch.arange(count)])
    single = objective().draw(torch.zeros(count, 2, dtype=F64), Noise.from_seeds(range(count)))
    assert "again" not in single.more and "step" not in single.more
    assert torch.equal(single.more["time"], draw.more["time"])


def test_a_generator_begins_where_drawings_begin() -> None:
    """On a process of growing variance, too: noise of `prior_std`."""
    for schedule in (kind() for kind in SCHEDULES):
        made = objective(schedule, next(kind() for kind in PREDICTIONS if kind().refusal(schedule) is None))
        draw = made.draw(torch.zeros(4, 2, dtype=F64), Noise.from_seeds(range(4)))
        x, t = made.given(nothing(4), draw, ALONE)
        assert torch.equal(x, schedule.prior_std * draw.eps) and t.tolist() == [1] * 4


@pytest.mark.parametrize("steps", [1, 2])
def test_validation_asks_at_the_times_of_its_grid(steps: int) -> None:
    made, asked = objective(steps=steps), Affine()
    for t, there in ((0.1, 1 / steps), (0.5, 1 / steps), (0.7, 1.0)):
        x0, eps = values(0.3), values(-0.4)
        found = made.at(asked, x0, nothing(1), at(t), eps, Beside(teacher=TEACHER))
        assert asked.calls[-1] == there
        x_t = made.diffusion.perturb(x0, eps, at(there))
        goal = TEACHER.walk(x_t, at(there), nothing(1), WALK)
        end = x_t - there * (x_t - (0.2 + 0.8 * x_t))
        assert found.item() == pytest.approx((end - goal).item() ** 2, rel=1e-5)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="low must be in"):
        DMDConfig(low=0.9, high=0.5)
    for wrong in ({"fake_steps": 0}, {"steps": 0}, {"high": 1.0}, {"fake_rate": 0.0}, {"regression": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DMDConfig(**wrong)
    process = objective().diffusion
    for weighting, times in ((Learned(), UniformTimes()), (UniformWeight(), LossAware())):
        with pytest.raises(ValueError, match="expects no loss"):
            DMDConfig().build(diffusion=process, times=times, weighting=weighting, pairing=Independent())


def test_nothing_hides_a_number_that_is_none() -> None:
    broken = Beside(networks={FAKE: denoising(Data(FLOW, 0.8, math.nan))}, teacher=TEACHER)
    generator = Affine()
    total = objective().losses(generator, values(1), nothing(1), compared(values(1), at(0.4), values(1)), broken).total
    total.sum().backward()
    assert total.isnan().all() and generator.mean.grad is not None and generator.mean.grad.isnan()


def test_it_is_drawn_as_it_is_taught() -> None:
    """In as many steps, at the times of their uniform grid: what is refused otherwise is in tests/ldm/test_students.py.
    """
    two = DMDConfig(steps=2)
    assert two.drawn_in == (2,) and two.own_grid and two.aim == "clean"
