"""Guidance distillation against exact answers: a perfect student is classifier-free guidance in one call."""

from __future__ import annotations

from collections.abc import Callable

import conditional
import pytest
import torch
from conditional import TwoGaussians
from few_step import at, drawn, time_of, values
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Conditional
from ldm.diffusion import Diffusion
from ldm.exact import F64, scalar
from ldm.guidance import ClassifierFree, Embedded
from ldm.jumps import SCALE, beside
from ldm.noise import Noise
from ldm.objectives import Beside
from ldm.objectives.guidance_distillation import GuidanceDistillation, GuidanceDistillationConfig
from ldm.pairing import Independent
from ldm.predictions import PREDICTIONS, Prediction, Velocity
from ldm.samplers import RK4, sample
from ldm.schedules import EDM, SCHEDULES, VP, Flow, NoiseSchedule, match
from ldm.teacher import Teacher
from ldm.times import UniformTimes
from ldm.uncertainty import Weighed
from ldm.weighting import MinSNR, UniformWeight, Weighting

FLOW = Flow(t_min=0.0)
NULL = conditional.cond(0.0, 1)
SCALES = torch.tensor([1.0, 1.5, 2.0, 3.0, 14.0], dtype=F64)
Network = Callable[[Tensor, Tensor, Cond], Tensor]


def objective(schedule: NoiseSchedule = FLOW, prediction: Prediction | None = None,
              weighting: Weighting | None = None) -> GuidanceDistillation:
    built = GuidanceDistillationConfig().build(
        diffusion=Diffusion(schedule=schedule, prediction=prediction or Velocity()), times=UniformTimes(),
        weighting=weighting or UniformWeight(), pairing=Independent())
    assert isinstance(built, GuidanceDistillation)
    return built


def student(made: GuidanceDistillation, teacher: Conditional) -> Network:
    """A network that answers, in one call, what a guided teacher does."""
    schedule = made.diffusion.schedule

    def call(inputs: Tensor, level: Tensor, cond: Cond) -> Tensor:
        t = time_of(schedule, level)
        ends = teacher(inputs / match(schedule.input_scale(t), inputs), t, cond)
        return made.diffusion.target(ends.x0, ends.eps, t)

    return call


def batch(schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor, Cond]:
    """x0 and noise (5, 2, 3), times, and the condition 1 with a scale for each sample."""
    seeds = Noise.from_seeds(range(5))
    x0, eps = (seeds.normal((2, 3), key, dtype=F64) for key in ("x0", "eps"))
    t = schedule.trained(at(0.02, 0.3, 0.5, 0.8, 1.0))
    return x0, eps, t, beside(conditional.cond(1.0, 5), SCALE, SCALES)


@pytest.mark.parametrize(("schedule", "prediction"), [
    (schedule(), prediction()) for schedule in SCHEDULES for prediction in PREDICTIONS
    if prediction().refusal(schedule()) is None], ids=lambda part: part.kind)
def test_what_a_perfect_student_and_an_unguided_one_cost(schedule: NoiseSchedule, prediction: Prediction) -> None:
    """Nothing; and (w - 1)^2 times the distance that guidance by 2 makes, weighed by noise level."""
    weighting = MinSNR()
    made, (x0, eps, t, cond) = objective(schedule, prediction, weighting), batch(schedule)
    denoiser, draw = TwoGaussians(schedule), drawn(t, eps)._replace(factor=at(1, 2, 0.5, 1, 3))
    teacher = Teacher(denoiser, ClassifierFree(scale=5.0), NULL)
    x_t = made.diffusion.perturb(x0, eps, t)
    told, absent = denoiser(x_t, t, cond), denoiser(x_t, t, conditional.cond(0.0, 5))
    gap = made.diffusion.target(told.x0 - absent.x0, told.eps - absent.eps, t).square().flatten(1).mean(1)
    perfect = made.losses(student(made, teacher), x0, cond, draw, Beside(teacher=teacher))
    assert (perfect.total.double() / gap).max() < 1e-10
    plain = made.losses(student(made, denoiser), x0, cond, draw, Beside(teacher=teacher))
    wanted = (SCALES - 1) ** 2 * gap * weighting(made.diffusion, t)
    torch.testing.assert_close(plain.seen.double(), wanted, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(plain.total.double(), wanted * draw.factor, rtol=1e-5, atol=1e-9)
    found = made.at(student(made, denoiser), x0, cond, t, eps, Beside(teacher=teacher))
    torch.testing.assert_close(found.double(), (SCALES - 1) ** 2 * gap, rtol=1e-5, atol=1e-9)


def test_a_number_by_hand() -> None:
    """At x = 0.8, t = 1/2 of `flow`: x0 is 1.12 told, and 0.8889 untold, and by guidance of 3 the velocity -1.5644."""
    made, teacher = objective(), Teacher(TwoGaussians(FLOW), ClassifierFree(scale=3.0), NULL)
    with_it = 1 + 0.5 * 0.25 * (0.8 - 0.5) / (0.25 * 0.25 + 0.25)
    without = 0.5 * 1.25 * 0.8 / (0.25 * 1.25 + 0.25)
    guided = without + 3 * (with_it - without)
    velocity = (0.8 - guided) / 0.5
    cond = conditional.cond(1.0, 1)
    zero = made.losses(lambda x, *_: torch.zeros_like(x), values(0.6), cond, drawn(at(0.5), values(1.0)),
                       Beside(teacher=teacher))
    assert zero.total.item() == pytest.approx(velocity**2, rel=1e-6)
    assert (with_it, without, velocity) == pytest.approx((1.12, 0.8888889, -1.5644444), abs=1e-6)


@pytest.mark.parametrize("schedule", [Flow(), VP(), EDM()], ids=repr)
def test_a_perfect_student_is_classifier_free_guidance(schedule: NoiseSchedule) -> None:
    """At every scale that it is told, from one call of the batch, where guidance needs one of twice as many."""
    made = objective(schedule, next(cls() for cls in PREDICTIONS if cls().refusal(schedule) is None))
    x, cond = Noise.from_seeds(range(5)).normal((2, 3), "x", dtype=F64), conditional.cond(1.0, 5)
    learned = made.student(student(made, Teacher(TwoGaussians(schedule), null=NULL)))
    for scale in SCALES.tolist():
        guided = ClassifierFree(scale=scale)(TwoGaussians(schedule), cond, NULL)
        embedded = Embedded(scale=scale)(learned, cond, None)
        for t in map(scalar, (0.05, 0.4, 0.97)):
            ours, theirs = embedded(x, t), guided(x, t)
            torch.testing.assert_close(ours.x0, theirs.x0, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(ours.eps, theirs.eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("scale", "std", "mean"), [
    (1.0, 0.5, 1.0), (1.5, 0.3343702, 1.2098675), (2.0, 0.2236068, 1.3228067), (3.0, 0.1, 1.4)])
def test_where_the_ode_of_a_perfect_student_ends(scale: float, std: float, mean: float) -> None:
    """Told a scale on `flow`, where that of its teacher ends under guidance by it."""
    made, schedule = objective(), Flow()
    learned = made.student(student(made, Teacher(TwoGaussians(FLOW), null=NULL)))
    denoise = Embedded(scale=scale)(learned, conditional.cond(1.0, 2), None)
    grid = torch.linspace(1, schedule.t_min, 121, dtype=F64)
    end = sample(RK4(variable="t"), denoise, values(0.0, 1.0), grid, Noise.from_seeds([0, 1])).flatten()
    assert end[0].item() == pytest.approx(mean, abs=3e-5)  # of t_min
    assert (end[1] - end[0]).item() == pytest.approx(std, abs=3e-5)


def test_the_student_is_told_its_scale_and_alone_learns() -> None:
    made, (x0, eps, t, cond) = objective(), batch(FLOW)
    seen: list[Tensor] = []
    answer = torch.full((5, 2, 3), 0.3, dtype=F64, requires_grad=True)

    def call(inputs: Tensor, level: Tensor, cond: Cond) -> Weighed:
        seen.append(cond.extras[SCALE])
        return Weighed(answer, level.float() / 1000)

    loss = made.losses(call, x0, cond, drawn(t, eps), Beside(teacher=Teacher(TwoGaussians(FLOW), null=NULL)))
    assert len(seen) == 1 and torch.equal(seen[0], SCALES)
    plain = made.losses(lambda *_: answer, x0, cond, drawn(t, eps),
                        Beside(teacher=Teacher(TwoGaussians(FLOW), null=NULL)))
    torch.testing.assert_close(loss.total, plain.total * (-t.float()).exp() + t.float(), rtol=1e-6, atol=1e-6)
    loss.total.sum().backward()  # type: ignore[no-untyped-call]
    assert answer.grad is not None and answer.grad.abs().min() > 0


def test_a_teacher_is_needed() -> None:
    made, (x0, eps, t, cond) = objective(), batch(FLOW)
    assert GuidanceDistillationConfig().taught == "yes"
    for ask in (lambda: made.losses(lambda x, *_: x, x0, cond, drawn(t, eps)),
                lambda: made.at(lambda x, *_: x, x0, cond, t, eps)):
        with pytest.raises(ValueError, match="objective.kind guidance learns from .*--teacher"):
            ask()
