"""What holds of every few-step model, whatever taught it: a new member is tried here without a line."""

from __future__ import annotations

import pytest
import torch
from few_step import Data, network, nothing

from ldm.diffusion import Diffusion
from ldm.exact import F64
from ldm.jumps import Jumping
from ldm.noise import Noise
from ldm.objectives import FEW_STEP
from ldm.objectives.base import ObjectiveConfig
from ldm.predictions import V, Velocity
from ldm.samplers import ConsistencySampler, JumpSampler, Sampler, sample
from ldm.schedules import EDM, VP, Flow, NoiseSchedule

each = pytest.mark.parametrize("kind", FEW_STEP, ids=lambda kind: kind.kind)
every_schedule = pytest.mark.parametrize("schedule", [Flow(), VP(), EDM()], ids=lambda schedule: schedule.kind)


def exact(kind: type[ObjectiveConfig], schedule: NoiseSchedule, std: float = 0.5) -> Jumping:
    """A model of this kind whose network takes N(0, std^2) along its ODE, to where it is asked or to the clean end."""
    diffusion, config = Diffusion(schedule=schedule, prediction=Velocity()), kind()
    denoiser = config.denoiser(network(config, Data(schedule, std)), diffusion)
    assert isinstance(denoiser, Jumping)
    return denoiser


def spread(denoiser: Jumping, sampler: Sampler, *times: float) -> float:
    """The root mean square of what it draws of the noise of t = 1, of 4096 samples and those of the opposite signs."""
    z = Noise.from_seeds([0]).normal((4096,), "z", dtype=F64).T
    start = Data(denoiser.schedule).schedule(torch.ones((), dtype=F64))
    x = torch.cat([z, -z]) * (start.alpha**2 * 0.25 + start.sigma**2).sqrt()
    noise = Noise.from_seeds(range(len(x)))
    end = sample(sampler, denoiser.bind(nothing(len(x))), x, torch.tensor(times, dtype=F64), noise)
    return (end.square().mean() / z.square().mean()).sqrt().item()


@each
@every_schedule
def test_one_exact_jump_is_the_whole_way(kind: type[ObjectiveConfig], schedule: NoiseSchedule) -> None:
    for sampler in (JumpSampler(), ConsistencySampler()):
        assert spread(exact(kind, schedule), sampler, 1, 0) == pytest.approx(0.5, abs=1e-9)


@each
@every_schedule
@pytest.mark.parametrize("times", [(1, 0.5, 0), (1, 0.9, 0.31, 0.3, 0)], ids=["2", "4"])
def test_any_split_of_the_way_gives_the_same_data(kind: type[ObjectiveConfig], schedule: NoiseSchedule,
                                                  times: tuple[float, ...]) -> None:
    """One that is told how far it goes, by its jumps exactly; one that goes to the clean end, by noise in between."""
    denoiser = exact(kind, schedule)
    if denoiser.aim == "any":
        assert spread(denoiser, JumpSampler(), *times) == pytest.approx(0.5, abs=1e-9)
    if denoiser.aim in ("any", "clean"):
        assert spread(denoiser, ConsistencySampler(), *times) == pytest.approx(0.5, rel=0.03)


@each
def test_it_is_a_denoiser_too(kind: type[ObjectiveConfig]) -> None:
    """Its answer at one time makes up x there, whatever the prediction."""
    x, t = torch.tensor([[0.7], [-1.2]], dtype=F64), torch.tensor(0.6, dtype=F64)
    for prediction in (Velocity(), V()):
        schedule, config = Flow(), kind()
        network_ = network(config, Data(schedule), prediction)
        denoiser = config.denoiser(network_, Diffusion(schedule=schedule, prediction=prediction))
        ends, (alpha, sigma) = denoiser(x, t, nothing(2)), schedule(t)
        torch.testing.assert_close(alpha * ends.x0 + sigma * ends.eps, x, rtol=0, atol=1e-12)
        if denoiser.aim == "any":  # type: ignore[attr-defined]
            torch.testing.assert_close(ends.x0, Data(schedule).denoised(x, t.expand(2)).x0, rtol=0, atol=1e-9)
