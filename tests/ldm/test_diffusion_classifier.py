"""The diffusion classifier on Gaussians, where its sums are Bayes' rule or a known multiple of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from looping import each
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Conditional, Denoiser
from ldm.diffusion import Denoised, Diffusion
from ldm.diffusion_classifier import DiffusionClassifier, Question, best, posterior, question, radical_inverse
from ldm.exact import F64, scalar
from ldm.noise import Noise
from ldm.predictions import X0, Prediction, V, Velocity
from ldm.schedules import SCHEDULES, Flow, NoiseSchedule, Table, match
from ldm.weighting import ELBO, SNR, UniformWeight, Weighting

FLOW = Flow(t_min=1e-9)
HERMITE = (torch.tensor([-(3**0.5), 0.0, 3**0.5], dtype=F64), torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=F64))
WIDE_HERMITE = (  # exact for the square of a quadratic too
    torch.tensor([-2.8569700138728056, -1.355626179974266, 0.0, 1.355626179974266, 2.8569700138728056], dtype=F64),
    torch.tensor([0.011257411327720691, 0.22207592200561266, 0.5333333333333333, 0.22207592200561266,
                  0.011257411327720691], dtype=F64),
)  # fmt: skip


@dataclass(frozen=True)
class Normals(Conditional):
    """The denoiser of N(m, std^2) on any process, at a time for each sample; m is the condition's number."""

    process: NoiseSchedule
    std: float = 0.5

    @property
    def schedule(self) -> NoiseSchedule:
        return self.process

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        alpha, sigma = (match(part, x) for part in self.process(t))
        mean = cond.context[:, 0].to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        rest, variance = x - alpha * mean, (alpha * self.std) ** 2 + sigma**2
        return Denoised(mean + rest * alpha * self.std**2 / variance, rest * sigma / variance)


def classes(*means: float) -> Cond:
    return Cond(torch.tensor(means, dtype=F64).view(-1, 1, 1), torch.ones(len(means), 1, dtype=torch.bool))


def classifier(schedule: NoiseSchedule = FLOW, std: float = 0.5, prediction: Prediction | None = None,
               **settings: object) -> DiffusionClassifier:
    diffusion = Diffusion(schedule=schedule, prediction=prediction or V())
    return DiffusionClassifier(denoiser=Normals(schedule, std), diffusion=diffusion, **settings)  # type: ignore[arg-type]


def given(x: Tensor) -> Callable[[Noise], Tensor]:
    """The data, whatever the noise."""
    return lambda noise: x


def expected(asker: DiffusionClassifier, weighting: Weighting, x: float, means: Cond, points: int) -> Tensor:
    """The sums (C,) that the classifier estimates: times by the midpoint rule, noise by quadrature."""
    t = asker.diffusion.schedule.trained((torch.arange(points, dtype=F64) + 0.5) / points)
    nodes, shares = HERMITE
    times = t.repeat_interleave(3)
    asked = Question(torch.full((len(times), 1), x, dtype=F64), nodes.repeat(points)[:, None], times)
    errors = replace(asker, batch_size=len(times)).errors(asked, means, torch.ones(len(times), 2, dtype=torch.bool))
    means_of = (errors.view(points, 3, 2) * shares[:, None]).sum(1)
    return (weighting(asker.diffusion, t)[:, None] * means_of).mean(0)


EVERY = [cls() for cls in SCHEDULES] + [cls(zero_terminal_snr=True) for cls in SCHEDULES if issubclass(cls, Table)]


@each("schedule", EVERY)
def test_the_bound_is_bayes_rule_on_every_schedule(schedule: NoiseSchedule) -> None:
    """The gap is (x - m)^2 / 2 s^2, less what lies beyond the ends of the schedule: with r = SNR the integral of
    dr / 2 (r s^2 + 1)^2 between them."""
    points = 8 * schedule.steps if isinstance(schedule, Table) else 8000
    zero, one = expected(classifier(schedule), ELBO(), 0.3, classes(0, 1), points).tolist()
    ends = torch.tensor([1.0, max(schedule.t_min, 1e-6)], dtype=F64)
    low, high = (1 / (1 + schedule.logsnr(ends).exp() / 4)).tolist()
    assert one - zero == pytest.approx((0.49 - 0.09) * 2 * (low - high), rel=0.02)
    if isinstance(schedule, Flow):
        assert one - zero == pytest.approx(0.8, rel=1e-4)
        assert posterior(torch.tensor([zero, one]))[0].item() == pytest.approx(0.689974, abs=2e-5)


CONSTANTS = {  # of (x - m)^2, for times uniform on flow
    0.5: {"velocity": math.pi / 2, "eps": 0.395805, "x0": 0.545865},
    1.0: {"velocity": 0.785398, "eps": 0.107301, "x0": 0.392699},
}
SPACES: dict[str, tuple[Prediction, Weighting]] = {
    "velocity": (Velocity(), UniformWeight()), "eps": (Velocity(), SNR()), "x0": (X0(), UniformWeight()),
}  # fmt: skip


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("std", CONSTANTS)
def test_uniform_times_are_a_multiple_of_the_squared_distance(std: float, space: str) -> None:
    prediction, weighting = SPACES[space]
    zero, one = expected(classifier(FLOW, std, prediction), weighting, 0.3, classes(0, 1), 20_000).tolist()
    assert (one - zero) / 0.4 == pytest.approx(CONSTANTS[std][space], abs=2e-6)


def test_uniform_errors_of_eps_are_no_posterior() -> None:
    """They rank as Bayes' rule does and believe less of it: .539498 for .689974."""
    zero, one = expected(classifier(), SNR(), 0.3, classes(0, 1), 20_000)
    assert posterior(torch.stack([zero, one]))[0].item() == pytest.approx(0.539498, abs=1e-6)


def test_weights_do_not_depend_on_the_target_that_is_compared() -> None:
    """ELBO and SNR mean errors of eps, whichever prediction they are computed on."""
    for weighting in (ELBO(), SNR()):
        sums = [expected(classifier(FLOW, 0.5, target), weighting, 0.3, classes(0, 1), 50) for target in (V(), X0())]
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-9, atol=0)


def test_variance_of_the_gap_by_shared_and_by_independent_noise() -> None:
    """4 a^2 (b1 - b2)^2 against 4 a^4 + 4 a^2 (b1^2 + b2^2): on these exact errors sharing is the worse of the two."""
    nodes, shares = WIDE_HERMITE
    asked = Question(torch.zeros(5, 1, dtype=F64), nodes[:, None], torch.full((5,), 0.5, dtype=F64))
    asker = classifier(prediction=Velocity())
    # Errors of eps are those of the velocity times 1 - t.
    errors = asker.errors(asked, classes(-0.3, 0.7), torch.ones(5, 2, dtype=torch.bool)) / 4

    def variance(values: Tensor) -> float:
        return (shares @ values**2 - (shares @ values) ** 2).item()

    assert variance(errors[:, 0] - errors[:, 1]) == pytest.approx(0.1024, abs=1e-12)
    assert variance(errors[:, 0]) + variance(errors[:, 1]) == pytest.approx(0.0658, abs=5e-5)


def test_draws_come_near_to_bayes() -> None:
    """Over many samples of noise the mean gap is .8, and with posterior samples of z the mean over them."""
    noise, x = Noise.from_seeds(list(range(400))), torch.full((400, 1), 0.3, dtype=F64)
    scores = classifier(draws=16)(given(x), noise, classes(0, 1))
    gap = scores[0, :, 1] - scores[0, :, 0]
    assert gap.mean().item() == pytest.approx(0.8, abs=4 * gap.std().item() / 20)

    def drawn(source: Noise) -> Tensor:
        return 0.3 + 0.2 * source.normal((1,), "z", dtype=F64)

    scores = classifier(draws=16)(drawn, noise, classes(0, 1))  # E (x - 1)^2 - x^2 = 1 - 2 E x
    gap = scores[0, :, 1] - scores[0, :, 0]
    assert gap.mean().item() == pytest.approx(0.8, abs=4 * gap.std().item() / 20)


@dataclass(frozen=True)
class Elsewhere:
    """Data keyed by its sample."""

    shape: tuple[int, ...] = (2, 3, 3)

    def __call__(self, noise: Noise) -> Tensor:
        return noise.normal(self.shape, "z", dtype=F64)


def test_a_samples_scores_are_its_own() -> None:
    """They depend on no other sample, no size of batch, no other condition and no order of them."""
    noise, means = Noise.from_seeds([7, 8, 9]), (0.0, 1.0, -0.5, 0.25)
    scores = classifier(draws=5)(Elsewhere(), noise, classes(*means))
    for size in (1, 5, 100):
        assert torch.equal(classifier(draws=5, batch_size=size)(Elsewhere(), noise, classes(*means)), scores)
    assert torch.equal(classifier(draws=5)(Elsewhere(), noise[1:2], classes(*means)), scores[:, 1:2])
    some = torch.tensor([3, 1])
    assert torch.equal(classifier(draws=5)(Elsewhere(), noise, classes(0.25, 1.0)), scores[:, :, some])
    same = classifier(draws=5)(Elsewhere(), noise, classes(0.1, 0.1))
    assert torch.equal(same[:, :, 0], same[:, :, 1])


def test_fewer_draws_are_the_beginning_of_more() -> None:
    """And each has its own noise, data and time, the first 2^n times one in each of 2^n equal shares."""
    noise, diffusion = Noise.from_seeds([3, 4]), Diffusion(schedule=FLOW, prediction=V())
    asked = [question(Elsewhere(), noise, number, diffusion) for number in range(8)]
    for count in (1, 2, 4, 8):
        shares = (torch.stack([one.t for one in asked[:count]]) * count).floor().sort(0).values
        assert torch.equal(shares, torch.arange(count, dtype=F64)[:, None].expand(-1, 2))
    for name in ("x0", "eps"):
        parts = torch.stack([getattr(one, name) for one in asked]).flatten(0, 1)
        assert len({tuple(part.flatten().tolist()) for part in parts}) == 16
    assert [radical_inverse(number) for number in range(6)] == [0, 0.5, 0.25, 0.75, 0.125, 0.625]
    assert not torch.equal(asked[0].t[0], asked[0].t[1])
    few, many = (classifier(draws=draws)(Elsewhere(), noise, classes(0, 1)) for draws in (3, 4))
    last = classifier(draws=4)
    weights = torch.stack([weighting(diffusion, asked[3].t) for weighting in last.weightings])
    errors = last.errors(asked[3], classes(0, 1), torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(4 * many, 3 * few + weights[:, :, None] * errors)


def test_whoever_stays_scores_as_if_all_had_stayed() -> None:
    """Bit for bit; the others end as infinity, and the rule is the least means by any weighting."""
    noise, means = Noise.from_seeds(list(range(12))), classes(*(0.3 * k for k in range(8)))
    full = classifier(draws=12)(Elsewhere(), noise, means)
    staged = classifier(draws=12, keep={3: 4, 6: 1})(Elsewhere(), noise, means)
    stays = staged.isfinite()
    assert torch.equal(stays[0], stays[1]) and torch.equal(staged[stays], full[stays])
    assert bool(((stays[0].sum(1) >= 1) & (stays[0].sum(1) <= 2)).all()) and bool((staged[~stays] == torch.inf).all())
    first = best(classifier(draws=3)(Elsewhere(), noise, means), 4)
    second = classifier(draws=6)(Elsewhere(), noise, means).masked_fill(~first, torch.inf)
    assert torch.equal(stays[0], best(second, 1))
    right = full.argmin(2) == staged.argmin(2)
    assert torch.equal(right, stays.gather(2, full.argmin(2, keepdim=True))[:, :, 0])
    kept = classifier(draws=12, keep={3: 8})(Elsewhere(), noise, means)
    assert torch.equal(kept, full)


def test_the_best_are_counted_by_each_score_and_never_come_back() -> None:
    scores = torch.tensor([[[1.0, 2, 3, 4]], [[4.0, 3, 2, 1]]])
    assert best(scores, 1).tolist() == [[True, False, False, True]]
    assert best(scores.index_fill(2, torch.tensor([0, 3]), torch.inf), 3).tolist() == [[False, True, True, False]]
    assert posterior(torch.tensor([0.0, math.inf])).tolist() == [1, 0]


def test_a_network_is_asked_in_its_own_precision_and_nothing_is_learnt() -> None:
    """Each row has its own time and condition; sums over a sample's elements are taken in float64."""
    seen: list[tuple[int, torch.dtype]] = []

    def network(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        seen.append((len(x), x.dtype))
        assert level.shape == (len(x),) == cond.mask.shape[:1] and not torch.is_grad_enabled()
        return torch.zeros_like(x).requires_grad_()

    diffusion = Diffusion(schedule=FLOW, prediction=Velocity())
    asker = DiffusionClassifier(denoiser=Denoiser(network, diffusion), diffusion=diffusion, draws=2, batch_size=4)
    noise, x = Noise.from_seeds([0, 1, 2]), torch.ones(3, 1, 4, 4)
    scores = asker(given(x), noise, classes(0, 1))
    assert seen == [(4, torch.float32), (2, torch.float32)] * 2 and scores.dtype == F64
    asked = question(given(x), noise, 0, diffusion)
    with torch.no_grad():
        errors = asker.errors(asked, classes(0, 1), torch.ones(3, 2, dtype=torch.bool))
    torch.testing.assert_close(errors[:, 0], (asked.eps - x).double().square().flatten(1).sum(1))


@pytest.mark.parametrize("settings", [{"draws": 0}, {"batch_size": 0}, {"weightings": ()}, {"keep": {32: 1}},
                                      {"keep": {0: 1}}, {"keep": {4: 0}}])  # fmt: skip
def test_nonsense_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="at least"):
        classifier(**settings)  # type: ignore[arg-type]


def test_pure_noise_asks_nothing() -> None:
    """At t = 1 of a process that ends in pure noise every condition is as far off, in finite numbers."""
    asker = classifier()
    asked = Question(torch.full((1, 1), 0.3, dtype=F64), torch.ones(1, 1, dtype=F64), scalar(1.0)[None])
    errors = asker.errors(asked, classes(0, 1), torch.ones(1, 2, dtype=torch.bool))
    for weighting in asker.weightings:
        assert weighting(asker.diffusion, asked.t).tolist() == [0] and bool(errors.isfinite().all())
