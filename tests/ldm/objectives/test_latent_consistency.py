"""Latent consistency models against exact answers: the boundary, and the chain of guided DDIM steps that is learned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from few_step import Data, Exact, at, drawn, network, nothing, values
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Conditional
from ldm.diffusion import Denoised, Diffusion
from ldm.guidance import ClassifierFree
from ldm.jumps import SCALE, beside, mixed
from ldm.objectives import Beside
from ldm.objectives.latent_consistency import LatentConsistency, LatentConsistencyConfig, boundary
from ldm.objectives.self_consistency import TARGET
from ldm.pairing import Independent
from ldm.predictions import Eps, Prediction, V, Velocity
from ldm.schedules import EDM, DDPMLinear, DDPMScaledLinear, Flow, NoiseSchedule
from ldm.teacher import Teacher
from ldm.times import UniformTimes
from ldm.weighting import MinSNR, UniformWeight, Weighting

TABLE = DDPMScaledLinear()


def objective(config: LatentConsistencyConfig, schedule: NoiseSchedule = TABLE, prediction: Prediction | None = None,
              weighting: Weighting | None = None) -> LatentConsistency:
    diffusion = Diffusion(schedule=schedule, prediction=prediction or V())
    built = config.build(diffusion=diffusion, times=UniformTimes(), weighting=weighting or UniformWeight(),
                         pairing=Independent())
    assert isinstance(built, LatentConsistency)
    return built


TOLD, ABSENT = Data(TABLE, 0.5, 1.0), Data(TABLE, 1.25**0.5)


class Told(Conditional):
    """N(1, 0.25) where the condition says so, by a context of 1, and N(0, 1.25) where it says 0."""

    @property
    def schedule(self) -> NoiseSchedule:
        return TABLE

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        told, absent = TOLD.denoised(x, t), ABSENT.denoised(x, t)
        says = cond.context[:, 0] > 0
        return Denoised(torch.where(says, told.x0, absent.x0), torch.where(says, told.eps, absent.eps))


def guided(scales: Tensor) -> tuple[Teacher, Cond]:
    cond = beside(nothing(len(scales))._replace(context=torch.ones(len(scales), 1, 1)), SCALE, scales)
    return Teacher(Told(), ClassifierFree(scale=1.0), nothing(1)), cond


def chain(scales: Tensor, steps: int) -> Callable[[Tensor, Tensor, Tensor], Denoised]:
    """Where DDIM steps of what is told against what is not, guided as the formula has it, end at the first entry."""

    def walked(x: Tensor, t: Tensor, _: Tensor) -> Denoised:
        end, now, w = x, t, scales[:, None]
        for _step in range(steps):
            s = (now - 1 / steps).clamp(min=TABLE.t_min)
            a, b = TOLD.denoised(end, now), ABSENT.denoised(end, now)
            there = mixed(TABLE, Denoised(b.x0 + w * (a.x0 - b.x0), b.eps + w * (a.eps - b.eps)), s)
            end, now = torch.where((now > TABLE.t_min)[:, None], there, end), s
        alpha, sigma = (part[:, None] for part in TABLE(t))
        return Denoised(end, (x - alpha * end) / sigma)

    return walked


@pytest.mark.parametrize(("index", "skip"), [(0, 1.0), (19, 6.93e-6), (39, 1.64e-6)])
def test_the_boundary_of_the_table(index: int, skip: float) -> None:
    of_x, of_x0 = boundary(TABLE, at((index + 1) / 1000))
    assert of_x.item() == pytest.approx(skip, rel=3e-3)
    assert of_x0.item() == pytest.approx((1 - of_x.item()) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", [TABLE, DDPMLinear(), EDM(), Flow(), Flow(t_min=0.0)], ids=repr)
def test_f_is_x_at_the_boundary_to_the_last_bit(schedule: NoiseSchedule, dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0), dtype=dtype)
    diffusion, config = Diffusion(schedule=schedule, prediction=V()), LatentConsistencyConfig()
    for shape in ((3,), ()):
        ends = config.reading(diffusion, x, y, torch.full(shape, schedule.t_min, dtype=torch.float64))
        assert torch.equal(ends.x0, x) and ends.eps.isfinite().all()


@pytest.mark.parametrize("schedule", [TABLE, DDPMLinear(zero_terminal_snr=True), EDM(), Flow()], ids=repr)
def test_both_ends_make_up_x(schedule: NoiseSchedule) -> None:
    t = schedule.trained(torch.linspace(0, 1, 9, dtype=torch.float64))
    x, y = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    diffusion = Diffusion(schedule=schedule, prediction=V())
    ends, plain = LatentConsistencyConfig().reading(diffusion, x, y, t), diffusion.recover(x, y, t)
    torch.testing.assert_close(mixed(schedule, ends, t), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ends.x0[2:], plain.x0[2:], rtol=1e-4, atol=1e-4)  # past the first entries, x0 itself


def test_steps_skip_twenty_entries_of_a_thousand() -> None:
    """And the last of them ends at the first entry, index 0."""
    built = objective(LatentConsistencyConfig())
    t, s, weight = built.interval(at(0.001, 0.02, 0.0201, 0.039, 0.14, 0.999, 1), Beside())
    torch.testing.assert_close(1000 * t - 1, at(19, 19, 39, 39, 139, 999, 999), rtol=1e-12, atol=0)
    torch.testing.assert_close(1000 * s - 1, at(0, 0, 19, 19, 119, 979, 979), rtol=1e-12, atol=1e-12)
    assert torch.equal(weight, torch.ones_like(t))
    flow = objective(LatentConsistencyConfig(skip=0.25), Flow())
    t, s, _ = flow.interval(at(0.1, 0.3, 1), Beside())
    assert t.tolist() == [0.25, 0.5, 1] and s.tolist() == [1e-5, 0.25, 0.75]


@pytest.mark.parametrize("ema", [0.0, 0.95])
def test_the_fixed_point_is_the_guided_chain_at_each_scale(ema: float) -> None:
    """A student that answers where 50 guided steps end costs nothing, told the scale that its teacher is told."""
    config, scales = LatentConsistencyConfig(ema=ema), at(1, 1.5, 3, 8)
    perfect = network(config, Data(TABLE), V(), pair=chain(scales, 50))
    heard: list[Tensor] = []

    def student(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        heard.append(cond.extras[SCALE])
        return perfect(x, level, cond)

    teacher, cond = guided(scales)
    x0, eps, t = values(0.2, 1.1, 0.9, 0.4), values(0.3, -1.2, 0.8, -0.1), at(0.02, 0.3, 0.62, 1)
    draw, around = drawn(t, eps), Beside(networks={TARGET: student}, teacher=teacher)
    assert objective(config).losses(student, x0, cond, draw, around).total.max() < 1e-12
    assert len(heard) == 2 and all(torch.equal(scale, scales) for scale in heard)
    other = network(config, Data(TABLE), V(), pair=chain(scales + 0.5, 50))
    around = Beside(networks={TARGET: other}, teacher=teacher)
    assert objective(config).losses(other, x0, cond, draw, around).total[1:3].min() > 1e-4


def test_a_plain_denoiser_costs() -> None:
    config, data = LatentConsistencyConfig(), Data(TABLE, 0.5, 0.3)
    plain = network(config, data, V(), pair=lambda x, t, s: data.denoised(x, t))
    x0, eps, t = values(0.9, 1.1, 0.4), values(0.3, -1.2, 1.1), at(0.1, 0.3, 0.5)
    around = Beside(networks={TARGET: plain}, teacher=Teacher(Exact(data)))
    assert objective(config).losses(plain, x0, nothing(3), drawn(t, eps), around).total.min() > 1e-4


def test_the_distance_is_of_each_element() -> None:
    f = torch.zeros(2, 1, 2, 2)
    f[0, 0, 0, 0], f[1] = 0.001, 1.0
    got = LatentConsistencyConfig().distance(f, 0 * f)
    assert got[0].item() == pytest.approx((2**0.5 - 1) * 0.001 / 4, rel=1e-5)
    assert got[1].item() == pytest.approx((1 + 1e-6) ** 0.5 - 0.001, rel=1e-6)


def test_what_is_refused_and_what_is_kept() -> None:
    with pytest.raises(ValueError, match="set weighting.kind to uniform instead of min-snr"):
        objective(LatentConsistencyConfig(), weighting=MinSNR())
    with pytest.raises(ValueError, match="lcm learns from a trained model"):
        config, x = LatentConsistencyConfig(ema=0), values(1.0)
        objective(config).losses(network(config, Data(TABLE), V()), x, nothing(1), drawn(at(0.5), x))
    kept = LatentConsistencyConfig().companions()[TARGET].kept
    assert kept is not None and kept(0, 1) == 0.95 and not LatentConsistencyConfig(ema=0).companions()
    assert objective(LatentConsistencyConfig(), prediction=Eps()) and objective(LatentConsistencyConfig(), Flow(),
                                                                                 Velocity())
