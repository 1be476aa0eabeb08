"""Progressive distillation against exact answers: two teacher steps in one, and the chain of halvings."""

from __future__ import annotations

import pytest
import torch
from few_step import Data, Exact, at, drawn, network, nothing, values
from torch import Tensor

from ldm.diffusion import Denoised, Diffusion
from ldm.exact import F64
from ldm.jumps import BoundJump, chord
from ldm.noise import Noise
from ldm.objectives import ALONE, Beside
from ldm.objectives.progressive import PREVIOUS, Progressive, ProgressiveConfig
from ldm.pairing import Independent
from ldm.predictions import V, Velocity
from ldm.samplers import JumpSampler, sample
from ldm.schedules import GVP, Flow, NoiseSchedule
from ldm.teacher import Teacher
from ldm.times import UniformTimes
from ldm.weighting import UniformWeight

FLOW = Flow(t_min=0.0)


def objective(schedule: NoiseSchedule = FLOW, **settings: int) -> Progressive:
    diffusion = Diffusion(schedule=schedule, prediction=Velocity() if isinstance(schedule, Flow) else V())
    built = ProgressiveConfig(**settings).build(
        diffusion=diffusion, times=UniformTimes(), weighting=UniformWeight(), pairing=Independent())
    assert isinstance(built, Progressive)
    return built


@pytest.mark.parametrize(("schedule", "times", "z", "x0"), [
    (FLOW, (1, 0.75, 0.5), 0.5270270, 0.0540541),
    (FLOW, (0.5, 0.25, 0), 0.6461538, 0.6461538),
    (FLOW, (1, 0.5, 0), 0.2, 0.2),
    (FLOW, (0.75, 0.5, 0.25), 0.4918919, 0.2378378),
    (GVP(), (0.75, 0.625, 0.5), 0.8237936, 0.1410545),
])
def test_the_target_of_two_steps(schedule: NoiseSchedule, times: tuple[float, float, float], z: float,
                                 x0: float) -> None:
    """A student that answers the chord of two DDIM steps of the exact teacher costs nothing, and lands where they do.
    """
    teacher, x = Teacher(Exact(Data(schedule))), values(1.0)
    t, m, s = (at(time) for time in times)
    end = teacher.step(teacher.step(x, t, m, nothing(1)), m, s, nothing(1))
    assert end.item() == pytest.approx(z, abs=1e-7)
    assert chord(schedule, x, end, t, s).x0.item() == pytest.approx(x0, abs=1e-7)


def test_the_velocity_of_the_first_target() -> None:
    teacher, x = Teacher(Exact(Data(FLOW))), values(1.0)
    end = teacher.step(teacher.step(x, at(1), at(0.75), nothing(1)), at(0.75), at(0.5), nothing(1))
    pair = chord(FLOW, x, end, at(1), at(0.5))
    assert (pair.eps - pair.x0).item() == pytest.approx(0.9459459, abs=1e-7)


def two_steps(data: Data, count: int) -> object:
    """What a perfect student of `count` steps answers: the chord of two steps of the exact teacher."""
    teacher = Teacher(Exact(data))

    def pair(x: Tensor, t: Tensor, _: Tensor) -> Denoised:
        m, s = t - 0.5 / count, (t - 1 / count).clamp(min=0)
        end = teacher.step(teacher.step(x, t, m, nothing(len(x))), m, s, nothing(len(x)))
        return chord(data.schedule, x, end, t, s)

    return pair


@pytest.mark.parametrize("count", [1, 2, 8])
def test_what_a_perfect_student_and_a_teacher_cost(count: int) -> None:
    data, made = Data(FLOW, 0.25, 0.3), objective(from_steps=count, steps=count)
    x0, beside = values(0.3, -0.2, 0.1, 0.5), Beside(teacher=Teacher(Exact(data)))
    draw = drawn(at(0.05, 0.4, 0.7, 1.0), values(1.0, -0.5, 0.2, 0.9))
    perfect = network(made.config, data, pair=two_steps(data, count))  # type: ignore[arg-type]
    assert made.losses(perfect, x0, nothing(4), draw, beside).total.max() < 1e-12
    plain = network(made.config, data, pair=lambda x, t, s: data.denoised(x, t))
    assert made.losses(plain, x0, nothing(4), draw, beside).total[1:].min() > 1e-8


def test_later_rounds_learn_from_the_student_before() -> None:
    """In the second round the first teacher is not asked, and a network equal to the student of two steps is."""
    data, made = Data(FLOW), objective(from_steps=2, steps=1)
    of_two = network(made.config, data, pair=two_steps(data, 2))  # type: ignore[arg-type]

    def chain(x: Tensor, t: Tensor, _: Tensor) -> Denoised:
        middle = t - 0.5
        pair = two_steps(data, 2)
        first = pair(x, t, t)  # type: ignore[operator]
        x_m = 0.5 * first.x0 + 0.5 * first.eps
        return chord(FLOW, x, pair(x_m, middle, middle).x0, t, t * 0)  # type: ignore[operator]

    of_one = network(made.config, data, pair=chain)
    draw = drawn(at(1.0, 0.3), values(1.0, -0.7))
    late = Beside(step=7, steps=10, networks={PREVIOUS: of_two})
    assert made.losses(of_one, values(0.1, 0.2), nothing(2), draw, late).total.max() < 1e-12
    with pytest.raises(ValueError, match="--teacher"):
        made.losses(of_one, values(0.1, 0.2), nothing(2), draw, ALONE)


def test_rounds_and_when_the_student_is_copied() -> None:
    config = ProgressiveConfig(from_steps=8, steps=1)
    assert [config.count(step, 8) for step in range(8)] == [8, 8, 4, 4, 2, 2, 1, 1]
    kept = config.companions()[PREVIOUS].kept
    assert kept is not None and [kept(step, 8) for step in range(8)] == [1, 1, 0, 1, 0, 1, 0, 1]
    assert kept(8, 8) == 1  # past its end no other round begins
    assert [config.plan(step, 8) for step in (0, 3, 7)] == [f"the student of {n} steps" for n in (8, 4, 1)]
    assert not ProgressiveConfig(from_steps=4, steps=4).companions()
    with pytest.raises(ValueError, match="power of two"):
        ProgressiveConfig(from_steps=6, steps=4)


@pytest.mark.parametrize(("count", "std"), [
    (1, 0), (2, 0.2), (4, 0.3405405), (8, 0.4147846), (16, 0.4556831), (32, 0.4773636), (64, 0.4885553),
    (128, 0.4942451), (256, 0.4971143), (1024, 0.4992770)])
def test_the_chain_of_halvings_is_its_teachers_euler_chain(count: int, std: float) -> None:
    """However often it is halved, a perfect student of one step gives what N steps of the teacher give."""
    data = Data(FLOW)

    def halved(n: int) -> BoundJump:
        def once(x: Tensor, t: Tensor, s: Tensor) -> Denoised:
            return data.denoised(x, t.expand(len(x)))

        def twice(x: Tensor, t: Tensor, s: Tensor) -> Denoised:
            end = sample(JumpSampler(), halved(n // 2), x, torch.stack([t, (t + s) / 2, s]), Noise.from_seeds([0]))
            return chord(FLOW, x, end, t, s)

        return BoundJump(FLOW, once if n == 1 else twice)

    end = sample(JumpSampler(), halved(count), torch.ones(1, 1, dtype=F64), at(1, 0), Noise.from_seeds([0]))
    assert end.item() == pytest.approx(std, abs=1e-7)
