"""The guided teacher: classifier-free guidance bit for bit, and its steps against rules written out anew."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import conditional
import pytest
import torch
from conditional import TwoGaussians
from few_step import Data, Exact, at, nothing, values
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Bound
from ldm.exact import F64
from ldm.grids import Karras
from ldm.guidance import ClassifierFree
from ldm.jumps import SCALE, beside
from ldm.noise import Noise
from ldm.samplers import DDIM, RK4, Heun, sample
from ldm.schedules import EDM, SCHEDULES, VP, Flow, NoiseSchedule
from ldm.teacher import Teacher

NULL = conditional.cond(0.0, 1)
SEVERAL = [cls() for cls in SCHEDULES]


def told(schedule: NoiseSchedule, *, dtype: torch.dtype = F64) -> tuple[TwoGaussians, Tensor, Cond]:
    """The denoiser, five samples of 2 x 3 numbers and their condition."""
    x = Noise.from_seeds(range(5)).normal((2, 3), "x", dtype=dtype)
    return TwoGaussians(schedule), x * schedule.prior_std, conditional.cond(1.0, 5)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("rule", [
    ClassifierFree(scale=scale, interval=interval, rescale=rescale, interval_in=unit)
    for scale in (0.0, 0.3, 1.0, 1.5, 7.5) for interval in ((0.0, 1.0), (0.2, 0.6)) for rescale in (0.0, 0.7)
    for unit in ("noise-share", "t") if scale or not rescale])  # at scale 0 the rule rescales nothing
@pytest.mark.parametrize("schedule", [Flow(), VP(), EDM()], ids=repr)
def test_it_is_classifier_free_guidance_bit_for_bit(schedule: NoiseSchedule, rule: ClassifierFree,
                                                    dtype: torch.dtype) -> None:
    """At a time for all as at a time for each, by the scale of the rule as by one that is told."""
    denoiser, x, cond = told(schedule, dtype=dtype)
    last = 0.97 if rule.rescale else 1.0  # where the exact x0 is the same everywhere, it has no deviation to go by
    times = schedule.trained(torch.tensor([0.05, 0.3, 0.5, 0.8, last], dtype=F64))
    teacher, scales = Teacher(denoiser, rule, NULL), torch.full((5,), rule.scale, dtype=dtype)
    other = Teacher(denoiser, dataclasses.replace(rule, scale=3.3), NULL)
    answers = [teacher(x, times, cond), other(x, times, beside(cond, SCALE, scales))]
    for i, t in enumerate(times):
        wanted = rule(denoiser, cond, NULL)(x, t)
        alone = [teacher(x, t, cond), other(x, t, beside(cond, SCALE, scales))]
        for found in alone:
            assert torch.equal(found.x0, wanted.x0) and torch.equal(found.eps, wanted.eps)
        if dtype == F64:  # in float32 a coefficient of each sample is rounded before it multiplies
            for answer in answers:
                assert torch.equal(answer.x0[i], wanted.x0[i]) and torch.equal(answer.eps[i], wanted.eps[i])


def test_each_sample_has_a_scale_of_its_own() -> None:
    denoiser, x, cond = told(Flow())
    scales, t = torch.tensor([1.0, 1.5, 2.0, 3.0, 14.0]), at(0.4)[0]
    found = Teacher(denoiser, ClassifierFree(scale=9.0), NULL)(x, t, beside(cond, SCALE, scales))
    for i, scale in enumerate(scales.tolist()):
        wanted = ClassifierFree(scale=scale)(denoiser, cond, NULL)(x, t)
        assert torch.equal(found.x0[i], wanted.x0[i]) and torch.equal(found.eps[i], wanted.eps[i])


def test_what_the_denoiser_is_told() -> None:
    """Never the scale; other extras with the condition and without; one call of the batch where nothing is guided."""
    denoiser, x, cond = told(Flow())
    cond = beside(beside(cond, "image", x), SCALE, torch.full((5,), 2.0))
    Teacher(denoiser, ClassifierFree(scale=4.0), NULL)(x, at(0.4)[0], cond)
    plain = cond._replace(extras={"image": x})
    Teacher(denoiser, ClassifierFree(scale=1.0), NULL)(x, at(0.4)[0], plain)
    Teacher(denoiser)(x, at(0.4)[0], plain)
    assert denoiser.seen == [(["image"], 10), (["image"], 5), (["image"], 5)]


def test_nothing_is_learned_of_it() -> None:
    denoiser, x, cond = told(Flow())
    x.requires_grad_()
    teacher = Teacher(denoiser, ClassifierFree(scale=2.0), NULL)
    t, s = at(0.4)[0], at(0.2)[0]
    ways = teacher(x, t, cond).x0, teacher.step(x, t, s, cond), teacher.heun(x, t, s, cond), teacher.walk(x, t, cond, 2)
    assert not any(way.requires_grad for way in ways)


@pytest.mark.parametrize("schedule", SEVERAL, ids=repr)
def test_steps_are_the_samplers(schedule: NoiseSchedule) -> None:
    """`step` is DDIM, and `heun` the sampler of that name in sigma / alpha; at times of each sample, and of all."""
    denoiser, x, cond = told(schedule)
    teacher, noise = Teacher(denoiser, ClassifierFree(scale=2.5), NULL), Noise.from_seeds(range(5))
    pairs = schedule.trained(torch.tensor([[0.9, 0.7], [0.5, 0.45], [0.3, 0.1], [0.95, 0.2], [0.6, 0.5]], dtype=F64))
    for rule, taken in ((DDIM(), teacher.step), (Heun(variable="sigma"), teacher.heun)):
        each = taken(x, pairs[:, 0], pairs[:, 1], cond)
        for i, (t, s) in enumerate(pairs):
            bound = Bound(schedule, lambda x, t: teacher(x, t, cond))
            wanted = sample(rule, bound, x, torch.stack([t, s]), noise)
            torch.testing.assert_close(taken(x, t, s, cond), wanted, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(each[i], wanted[i], rtol=1e-11, atol=1e-11)


def test_heun_is_karras_rule_in_sigma() -> None:
    """Written out as in the paper (2206.00364, algorithm 1 without churn), on EDM, where sigma is 80 t."""
    x, sigma, after = values(3.0, -1.0, 0.2), torch.tensor([5.0, 0.9, 0.3], dtype=F64)[:, None], 0.25

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        return x * 0.09 / (0.09 + sigma**2)

    slope = (x - denoised(x, sigma)) / sigma
    euler = x + (after - sigma) * slope
    low = torch.full_like(sigma, after)
    wanted = x + (after - sigma) * (slope + (euler - denoised(euler, low)) / after) / 2
    teacher = Teacher(Exact(Data(EDM(), 0.3)))
    t, s = sigma[:, 0] / 80, low[:, 0] / 80
    torch.testing.assert_close(teacher.heun(x, t, s, nothing(3)), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(teacher.step(x, t, s, nothing(3)), euler, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("levels", "euler", "heun"), [
    (18, 0.4230382, 0.527633), (40, 0.4648582, 0.504885), (80, 0.4823281, 0.501153), (150, 0.4905485, 0.500316)])
def test_chains_of_steps_from_80(levels: int, euler: float, heun: float) -> None:
    """Where x = 80 at sigma 80 ends on data N(0, 1/4), along Karras' levels to 0.002: the numbers of consistency."""
    schedule = EDM()
    times = Karras()(levels, schedule)[:-1]
    teacher = Teacher(Exact(Data(schedule)))
    for rule, end in ((teacher.step, euler), (teacher.heun, heun)):
        x = values(80.0)
        for t, s in pairwise(times):
            x = rule(x, t, s, nothing(1))
        assert x.item() == pytest.approx(end, abs=1e-6)


@pytest.mark.parametrize("schedule", [schedule for schedule in SEVERAL if schedule.pure_noise], ids=repr)
def test_from_pure_noise_heun_is_ddim(schedule: NoiseSchedule) -> None:
    """Bit for bit, in a batch of which another sample begins below it."""
    teacher, x = Teacher(Exact(Data(schedule, 0.5, 0.3))), values(1.0, -0.4)
    first, low = at(1.0, 0.7), at(0.6, 0.4)
    found, plain = teacher.heun(x, first, low, nothing(2)), teacher.step(x, first, low, nothing(2))
    assert torch.equal(found[0], plain[0]) and not torch.isclose(found[1], plain[1], atol=1e-4).any()
    assert torch.equal(teacher.heun(x, at(1.0)[0], at(0.6)[0], nothing(2))[0], plain[0])


@pytest.mark.parametrize(("steps", "std"), [
    (1, 0.0), (2, 0.2), (4, 0.3405405), (8, 0.4147846), (16, 0.4556831), (64, 0.4885553)])
def test_a_walk_is_the_chain_of_euler(steps: int, std: float) -> None:
    teacher = Teacher(Exact(Data(Flow(t_min=0.0))))
    assert teacher.walk(values(1.0), at(1.0), nothing(1), steps).item() == pytest.approx(std, abs=1e-7)


@pytest.mark.parametrize("schedule", SEVERAL, ids=repr)
def test_a_walk_of_many_steps_ends_where_the_ode_does(schedule: NoiseSchedule) -> None:
    """From a time of its own for each sample; and of one that has less than a step of t_min to go."""
    data = Data(schedule, 0.5, 0.3)
    t = schedule.trained(at(0.05, 0.3, 0.6))
    x = values(0.4, -0.3, 1.0)
    errors = []
    for steps in (400, 800):
        end = Teacher(Exact(data)).walk(x, t, nothing(3), steps)
        errors.append((end - data.moved(x, t, torch.zeros_like(t))).abs().max().item())
    assert errors[1] < 2e-3 and errors[1] < 0.6 * errors[0] + 1e-5
    low = torch.full((1,), schedule.t_min or 1e-6, dtype=F64)
    near = Teacher(Exact(data)).walk(x[:1], low, nothing(1), 3)
    torch.testing.assert_close(near, data.denoised(x[:1], low).x0, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("scale", "std", "mean"), [
    (1.0, 0.5, 1.0), (1.5, 0.3343702, 1.2098675), (2.0, 0.2236068, 1.3228067), (3.0, 0.1, 1.4)])
def test_where_the_guided_ode_ends(scale: float, std: float, mean: float) -> None:
    """N(1, 1/4) guided away from N(0, 5/4) on `flow`: std_cond^w std_uncond^(1 - w), however the scale is told."""
    schedule, x = Flow(t_min=0.0), values(0.0, 1.0)
    cond = conditional.cond(1.0, 2)
    ways = [(Teacher(TwoGaussians(schedule), ClassifierFree(scale=scale), NULL), cond),
            (Teacher(TwoGaussians(schedule), null=NULL), beside(cond, SCALE, torch.full((2,), scale)))]
    grid = torch.linspace(1, 0, 121, dtype=F64)
    for teacher, told_ in ways:
        bound = Bound(schedule, lambda x, t, teacher=teacher, told_=told_: teacher(x, t, told_))  # type: ignore[misc]
        end = sample(RK4(variable="t"), bound, x, grid, Noise.from_seeds([0, 1])).flatten()
        assert end[0].item() == pytest.approx(mean, abs=1e-6)
        assert (end[1] - end[0]).item() == pytest.approx(std, abs=1e-6)
        assert std == pytest.approx(0.5**scale * 1.25 ** ((1 - scale) / 2), abs=1e-7)


def test_guidance_without_a_null_is_refused() -> None:
    alone, x, t = Exact(Data(Flow())), values(0.3, -0.4), at(0.5, 0.7)
    with pytest.raises(ValueError, match="null condition"):
        Teacher(alone, ClassifierFree(scale=2.0))(x, t, nothing(2))
    with pytest.raises(ValueError, match="null condition"):
        Teacher(alone)(x, t, beside(nothing(2), SCALE, torch.tensor([1.0, 2.0])))
    assert torch.equal(Teacher(alone)(x, t, nothing(2)).x0, alone(x, t, nothing(2)).x0)
