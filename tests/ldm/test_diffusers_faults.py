"""Where diffusers' schedulers are known to be wrong: ours is nearer the exact answer on Gaussian data.

Each test names the issue, or the place in the code (of diffusers 0.42.1) where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.exact import F64, Impulses, Isotropic, final_variance, gaussian, marginal
from ldm.grids import Linspace, Trailing
from ldm.noise import Noise
from ldm.samplers import DDIM, DDPM, IPNDM, DPMpp3M, DPMppSDE3M, Sampler, sample
from ldm.schedules import GVP

diffusers = pytest.importorskip("diffusers")
from test_diffusers_schedulers import COMMON, TABLE, theirs  # noqa: E402  (it too needs diffusers)

ONE = Noise.from_seeds([0])


def exact_eps(x: Tensor, t: Tensor) -> Tensor:
    """The eps of N(0, 1/4) at entry t of the table."""
    return gaussian(TABLE)(x, (t.double() + 1) / 1000).eps


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_ddim_on_linspace(steps: int) -> None:
    """Issues 12633 and 11347: from entry i it steps to i - T // steps, which is no entry of its own linspace grid.

    On data of one point DDIM has no error of its own, and the path alpha m + sigma z shows the fault alone. (On wider
    data theirs can end nearer: what it leaves of the noise makes up for some of what DDIM's order 1 takes too much.)
    """
    scheduler = diffusers.DDIMScheduler(**{**COMMON, "timestep_spacing": "linspace"}, clip_sample=False)
    scheduler.set_timesteps(steps)
    scheduler.timesteps = scheduler.timesteps[:-1]
    grid, point, z = Linspace()(steps, TABLE)[:-1], Isotropic(TABLE, 0.0, 0.8), 1.5
    starts, ends = ((alpha * 0.8 + sigma * z).expand(1, 1) for alpha, sigma in (TABLE(grid[0]), TABLE(grid[-1])))
    assert (sample(DDIM(), point, starts, grid, ONE) - ends).abs() < 1e-12
    drawn = theirs(scheduler, starts, model=lambda x, t: point(x, (t.double() + 1) / 1000).eps)
    assert (drawn - ends).abs() > 1e-3


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_ddpm_leaves_noise_in_the_last_step(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`DDPMScheduler.step`, line 543: the noise is left out at entry 0 alone, but where the spacing is "trailing" the
    last step starts above it, and lands on the data with the noise of a whole step."""
    scheduler = diffusers.DDPMScheduler(**COMMON, clip_sample=False, variance_type="fixed_large")
    scheduler.set_timesteps(steps)
    draws = iter(torch.eye(steps + 1, dtype=F64)[1:, :, None])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: next(draws))
    grid, x = Trailing()(steps, TABLE), torch.zeros(steps + 1, 1, dtype=F64)
    x[0] = marginal(TABLE, grid[0], 0.5) ** 0.5
    ours = final_variance(DDPM(variance="large"), TABLE, grid, 0.5, x[0].item())
    noisy = theirs(scheduler, x, model=exact_eps).square().sum().item()
    # What it adds is the last step's beta.
    assert noisy - ours == pytest.approx(TABLE(grid[-2]).sigma.item() ** 2, rel=1e-3)
    assert abs(ours - 0.25) < abs(noisy - 0.25)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_ipndm_from_pure_noise(steps: int) -> None:
    """`IPNDMScheduler._get_prev_sample`, line 273: x0 is (x - sigma eps) / max(alpha, 1e-8), which at its own first
    time, where alpha is 0, is 0 whatever the network says."""
    scheduler, mean = diffusers.IPNDMScheduler(), 0.8
    scheduler.set_timesteps(steps)
    oracle = Isotropic(GVP(), 0.5, mean)

    def v(x: Tensor, t: Tensor) -> Tensor:
        ends, (alpha, sigma) = oracle(x, t.double()), GVP()(t.double())
        return alpha * ends.eps - sigma * ends.x0

    x, grid = torch.ones(1, 1, dtype=F64), torch.cat([scheduler.timesteps.double(), torch.zeros(1, dtype=F64)])
    error = abs(sample(IPNDM(), oracle, x, grid, ONE).item() - (mean + 0.5))
    assert grid[0] == 1 and error < 0.1 * abs(theirs(scheduler, x, model=v).item() - (mean + 0.5))


def third_order(steps: int, algorithm: str) -> tuple[Any, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Their scheduler on sigmas even in log, those sigmas as our times, and the exact network at them."""
    options = {"solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": False}
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **COMMON, **options, algorithm_type=algorithm, use_exponential_sigmas=True)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    # Its last two sigmas are the same.
    scheduler.timesteps = scheduler.timesteps[: steps - 1]
    grid = TABLE.time(-2 * scheduler.sigmas[:steps].log()).clamp(max=1)
    return scheduler, grid, lambda x, t: gaussian(TABLE)(x, grid[scheduler.step_index or 0]).eps


@pytest.mark.parametrize("steps", [40, 80])
@pytest.mark.parametrize(("sampler", "algorithm"), [(DPMpp3M(), "dpmsolver++"), (DPMppSDE3M(), "sde-dpmsolver++")])
def test_dpm_solver_of_order_three(sampler: Sampler, algorithm: str, steps: int) -> None:
    """The released 3M (pull request 1132, of LuChengTHU/dpm-solver) multiplies the second derivative's weight by a
    second divided difference, which is half of it; its own singlestep rule has the 2 that is missing. The SDE's
    (pull request 9104; `multistep_dpm_solver_third_order_update`, line 1139) has that and a wrong sign besides: - 0.5
    where + 0.5 makes the weight vanish with h. See `DPMpp3M`."""
    scheduler, grid, model = third_order(steps, algorithm)
    x = torch.zeros(steps + 1, 1, dtype=F64)
    x[0] = marginal(TABLE, grid[0], 0.5) ** 0.5
    exact = marginal(TABLE, grid[-1], 0.5)
    draws = list(torch.eye(steps + 1, dtype=F64)[1:, :, None])
    error = abs(sample(sampler, gaussian(TABLE), x, grid, Impulses(steps + 1)).square().sum().item() - exact)
    assert error < 0.5 * abs(theirs(scheduler, x, draws, model=model).square().sum().item() - exact)
