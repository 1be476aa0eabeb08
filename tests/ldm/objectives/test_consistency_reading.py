"""What a consistency model's f is: its boundary and scalings, the pair that it makes up, and what is drawn with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from few_step import Data, at, values
from torch import Tensor

from ldm.diffusion import Denoised, Diffusion
from ldm.exact import F64, Impulses
from ldm.grids import Uniform
from ldm.jumps import BoundJump
from ldm.objectives.consistency import ConsistencyConfig, ConsistencyTrainingConfig
from ldm.objectives.self_consistency import bounded, pseudo_huber
from ldm.predictions import EDMF, X0, Eps, Prediction, V, Velocity
from ldm.samplers import ConsistencySampler, sample
from ldm.schedules import EDM, GVP, VE, VP, DDPMLinear, Flow, NoiseSchedule

Answer = Callable[[Tensor, Tensor, Tensor], Denoised]
DATA = Data(EDM())


@pytest.mark.parametrize(("sigma", "skip", "out", "answer"), [
    (0.5, 0.502004, 0.352139, 0.582464), (80, 3.90629e-5, 0.4999777, 0.0124223)])
def test_the_scalings(sigma: float, skip: float, out: float, answer: float) -> None:
    """And the F of the exact map, for x of 1 at sigma 0.5 and 80."""
    diffusion, t, one = Diffusion(schedule=EDM(), prediction=EDMF()), at(sigma / 80), values(1.0)
    of_x, of_y = (bounded(diffusion, x, y, t, 0.002, 0.5).x0.item() for x, y in ((one, 0 * one), (0 * one, one)))
    assert of_x == pytest.approx(skip, rel=2e-6) and of_y == pytest.approx(out, rel=2e-6)
    f = DATA.moved(one, t, at(EDM().t_min)).item()
    assert (f - of_x) / of_y == pytest.approx(answer, rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("prediction", [EDMF(), Velocity(), Eps(), V(), X0()], ids=repr)
def test_the_boundary_is_x_to_the_last_bit(prediction: Prediction, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 50, generator=generator, dtype=dtype)
    for schedule in (EDM(), EDM(sigma_min=0.03), VE()):
        config = ConsistencyConfig(sigma_min=1e-4)  # below all of them: the boundary is t_min
        for t in (torch.full((3,), schedule.t_min, dtype=F64), torch.tensor(schedule.t_min, dtype=F64)):
            ends = config.reading(Diffusion(schedule=schedule, prediction=prediction), x, y, t)
            assert torch.equal(ends.x0, x) and torch.equal(ends.eps, 0 * x)
    for other in (VP(), DDPMLinear()):
        t = torch.tensor(other.t_min, dtype=F64)
        ends = ConsistencyConfig().reading(Diffusion(schedule=other, prediction=prediction), x, y, t)
        torch.testing.assert_close(ends.x0, x / other(t).alpha.item(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("schedule", [Flow(), Flow(t_min=0.0), GVP(), VP(), EDM(), DDPMLinear(zero_terminal_snr=True)],
                         ids=repr)
def test_both_ends_make_up_x_and_are_finite_from_end_to_end(schedule: NoiseSchedule) -> None:
    t = torch.linspace(schedule.t_min, 1, 9, dtype=F64)
    x, y = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    alpha, sigma = (part[:, None] for part in schedule(t))
    found = []
    for prediction in (EDMF(sigma_data=0.7), V(), Velocity()):
        diffusion = Diffusion(schedule=schedule, prediction=prediction)
        ends = diffusion.recover(x, y, t)
        same = Diffusion(schedule=schedule, prediction=EDMF()).target(ends.x0, ends.eps, t)
        got = ConsistencyConfig().reading(diffusion, x, y, t)
        assert got.x0.isfinite().all() and got.eps.isfinite().all()
        torch.testing.assert_close(alpha * got.x0 + sigma * got.eps, x, rtol=1e-9, atol=1e-9)
        edm = ConsistencyConfig().reading(Diffusion(schedule=schedule, prediction=EDMF()), x, same, t)
        torch.testing.assert_close(got, edm, rtol=1e-8, atol=1e-8)  # whatever is predicted
        if schedule.pure_noise:
            torch.testing.assert_close(got.x0[-1], 0.5 * same[-1], rtol=1e-10, atol=1e-10)
        found.append(got)
    assert not torch.allclose(found[0].x0, found[1].x0)


def test_the_constant_of_pseudo_huber() -> None:
    """At a distance of c = 0.00054 sqrt(3072) = 0.0299298 the loss is (sqrt(2) - 1) c, per sqrt(d)."""
    f = torch.zeros(1, 3, 32, 32)
    f[0, 0, 0, 0] = 0.0299298
    got = pseudo_huber(f, torch.zeros_like(f), 0.00054).item()
    assert got == pytest.approx((2**0.5 - 1) * 0.0299298 / 3072**0.5, rel=1e-5)
    assert ConsistencyTrainingConfig().distance(f, 0 * f).item() == got
    assert ConsistencyConfig().distance(f, 0 * f).item() == pytest.approx(0.0299298**2 / 3072, rel=1e-6)


@pytest.mark.parametrize(("steps", "plain"), [(1, 0.0), (2, 0.2), (4, 0.269355)])
def test_what_the_consistency_sampler_draws(steps: int, plain: float) -> None:
    """The exact f gives the data's 0.5 in any number of steps, and a denoiser in its place, though it answers, not."""
    schedule = Flow(t_min=0.0)
    data = Data(schedule)

    def exactly(x: Tensor, t: Tensor, s: Tensor) -> Denoised:
        return data.jump(x, t.expand(len(x)), s.expand(len(x)))

    def denoise(x: Tensor, t: Tensor, s: Tensor) -> Denoised:
        return data.denoised(x, t.expand(len(x)))

    def spread(call: Answer) -> float:
        x = torch.zeros(2 + steps, 1, dtype=F64)
        x[0] = 1
        grid = Uniform()(steps, schedule)
        end = sample(ConsistencySampler(), BoundJump(schedule, call), x, grid, Impulses(len(x)))
        return float(end.square().sum().sqrt())

    assert spread(exactly) == pytest.approx(0.5, abs=1e-12)
    assert spread(denoise) == pytest.approx(plain, abs=1e-6)
