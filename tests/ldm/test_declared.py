"""What a sampler says of its calls and its order, away from the settings it has by default."""

from __future__ import annotations

import pytest
import torch
from looping import each

from ldm.exact import F64, Counted, final_variance, fitted_order, gaussian, marginal
from ldm.noise import Noise
from ldm.samplers import DEIS, IPNDM, LMS, HeunChurn, Langevin, PredictorCorrector, Sampler, UniPC, sample
from ldm.schedules import EDM, VP, Flow, NoiseSchedule

OTHERS: list[Sampler] = [
    *(PredictorCorrector(corrector_steps=steps, snr=snr) for steps in (0, 3) for snr in (0.0, 0.16)),
    *(Langevin(inner_steps=steps) for steps in (1, 8)),
    *(HeunChurn(churn=churn) for churn in (0.0, 0.4)),
    *(UniPC(solver_order=order, corrector=corrector) for order in (1, 2, 3) for corrector in (False, True)),
    *(cls(solver_order=order) for cls in (LMS, DEIS, IPNDM) for order in (1, 2, 3, 4)),
]
THREE = (Flow(), VP(), EDM())


@pytest.mark.parametrize("sampler", OTHERS, ids=repr)
def test_a_step_costs_what_is_declared(sampler: Sampler) -> None:
    for schedule in THREE:
        counted, grid = Counted(gaussian(schedule)), schedule.time(torch.linspace(-4, 4, 13, dtype=F64))
        sample(sampler, counted, torch.ones(1, 1, dtype=F64), grid, Noise.from_seeds([0]))
        assert len(counted.times) == 12 * sampler.calls + isinstance(sampler, UniPC)


@each("schedule", THREE)
@pytest.mark.parametrize("sampler", [sampler for sampler in OTHERS if sampler.order], ids=repr)
def test_the_error_falls_with_the_order_declared(sampler: Sampler, schedule: NoiseSchedule) -> None:
    """And no faster than by one power where that is 1: a rule of the first order says so."""
    counts, errors = [16, 32, 64, 128], []
    for steps in counts:
        grid = schedule.time(torch.linspace(-4.6, 4.6, steps + 1, dtype=F64))
        variance = final_variance(sampler, schedule, grid, 0.5, marginal(schedule, grid[0], 0.5) ** 0.5)
        errors.append(abs(variance - marginal(schedule, grid[-1], 0.5)))
    found = fitted_order(counts[1:], errors[1:])
    assert found > sampler.order - 0.25
    assert sampler.order > 1 or isinstance(sampler, IPNDM) or found < 1.25


def test_what_is_not_set_by_the_step_says_so() -> None:
    assert {repr(sampler) for sampler in OTHERS if not sampler.order} == {
        repr(sampler) for sampler in OTHERS
        if isinstance(sampler, Langevin) or (isinstance(sampler, HeunChurn) and sampler.churn)
        or (isinstance(sampler, PredictorCorrector) and sampler.snr and sampler.corrector_steps)
    }
