"""Equality with an independent implementation: diffusers' schedulers, from the same noise and the same network.

Where they are known to be wrong: `test_diffusers_faults`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.grids import Grid, Karras, Leading, Trailing, Uniform
from ldm.noise import Noise
from ldm.predictions import Eps, Prediction, V, Velocity
from ldm.samplers import (
    DDIM,
    DDPM,
    DEIS,
    IPNDM,
    LMS,
    PNDM,
    DPMpp2M,
    DPMpp3M,
    DPMppSDE2M,
    DPMppSDE3M,
    Euler,
    Heun,
    Sampler,
    UniPC,
    prior,
    sample,
)
from ldm.schedules import GVP, DDPMScaledLinear, Flow, NoiseSchedule

diffusers = pytest.importorskip("diffusers")

TABLE = DDPMScaledLinear()
COMMON = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
NOISE, SHAPE = Noise.from_seeds([1, 2, 3]), (2, 4, 4)


def network(x: Tensor, level: Tensor, cond: object = None) -> Tensor:
    """Any smooth function of x and the noise level will do."""
    level = torch.as_tensor(level).float().reshape(-1, *[1] * (x.ndim - 1))
    return 0.8 * torch.tanh(1.3 * x) + 0.2 * torch.sin(level / 150) * torch.cos(x)


def ours(sampler: Sampler, grid: Tensor, schedule: NoiseSchedule = TABLE, prediction: Prediction = Eps()) -> Tensor:  # noqa: B008
    denoiser = Denoiser(network, Diffusion(schedule=schedule, prediction=prediction))
    return sample(sampler, denoiser.bind(None), NOISE.normal(SHAPE), grid, NOISE)  # type: ignore[arg-type]


def theirs(
    scheduler: Any, start: Tensor, noises: list[Tensor] | None = None, model: Any = network, **steps: Any
) -> Tensor:
    """diffusers' own loop; `start` is x at the first time in our scale."""
    x = start
    for index, t in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        extra = steps if noises is None else {**steps, "variance_noise": noises[index]}
        x = scheduler.step(model(inputs, t), t, x, **extra).prev_sample
    return x


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def step_noise(count: int) -> list[Tensor]:
    return [NOISE.fold("step", index).normal(SHAPE) for index in range(count)]


@pytest.mark.parametrize(
    ("grid", "spacing", "offset"),
    [(Trailing(), "trailing", 0), (Leading(offset=1), "leading", 1)],
    ids=repr,
)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(grid: Grid, spacing: str, offset: int, eta: float) -> None:
    scheduler = diffusers.DDIMScheduler(
        **{**COMMON, "timestep_spacing": spacing}, clip_sample=False, steps_offset=offset
    )
    scheduler.set_timesteps(20)
    times = grid(20, TABLE)
    assert scheduler.timesteps.tolist() == [round(i) for i in (times[:-1] * 1000 - 1).tolist()]
    expected = theirs(scheduler, NOISE.normal(SHAPE), step_noise(20), eta=eta)
    close(ours(DDIM(eta=eta), times), expected)


def test_ddim_with_v_and_zero_terminal_snr() -> None:
    schedule = DDPMScaledLinear(zero_terminal_snr=True)
    scheduler = diffusers.DDIMScheduler(
        **COMMON, clip_sample=False, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    scheduler.set_timesteps(20)
    expected = theirs(scheduler, NOISE.normal(SHAPE))
    close(ours(DDIM(), Trailing()(20, schedule), schedule, V()), expected)


@pytest.mark.parametrize(("variance", "name"), [("small", "fixed_small"), ("large", "fixed_large")])
def test_ddpm(variance: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.DDPMScheduler(**COMMON, clip_sample=False, variance_type=name)
    scheduler.set_timesteps(20)
    # Without the noise that it adds to the last step where that starts above entry 0 (see `test_diffusers_faults`).
    noises = iter([*step_noise(19), torch.zeros(3, *SHAPE)])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: next(noises))
    close(ours(DDPM(variance=variance), Trailing()(20, TABLE)), theirs(scheduler, NOISE.normal(SHAPE)))


SIGMA_SPACE = [
    (diffusers.EulerDiscreteScheduler, Euler(variable="sigma")),
    (diffusers.HeunDiscreteScheduler, Heun(variable="sigma")),
    (diffusers.LMSDiscreteScheduler, LMS()),
]


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize(("cls", "sampler"), SIGMA_SPACE, ids=["euler", "heun", "lms"])
def test_solvers_in_sigma(cls: Any, sampler: Sampler, karras: bool) -> None:
    # Only its linspace lets the Karras range reach the ends of the table.
    scheduler = cls(**{**COMMON, "timestep_spacing": "linspace" if karras else "trailing"}, use_karras_sigmas=karras)
    scheduler.set_timesteps(20)
    grid = (Karras() if karras else Trailing())(20, TABLE)
    # Its x is ours over alpha, and ours starts as noise of unit variance.
    expected = theirs(scheduler, NOISE.normal(SHAPE) / TABLE(grid[0]).alpha.float())
    close(ours(sampler, grid), expected)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (DPMpp2M(), {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        (DDIM(), {"algorithm_type": "dpmsolver++", "solver_order": 1}),
        (DPMppSDE2M(), {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    ],
    ids=["2m", "1", "sde-2m"],
)
def test_dpm_solver(sampler: Sampler, options: dict[str, Any]) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**COMMON, **options, final_sigmas_type="zero")
    scheduler.set_timesteps(20)
    noises = step_noise(20) if isinstance(sampler, DPMppSDE2M) else None
    close(ours(sampler, Trailing()(20, TABLE)), theirs(scheduler, NOISE.normal(SHAPE), noises))


@pytest.mark.parametrize(("order", "last"), [(1, "zero"), (2, "zero"), (3, "sigma_min")])
def test_unipc(order: int, last: str) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        **COMMON, solver_order=order, lower_order_final=order < 3, final_sigmas_type=last
    )
    scheduler.set_timesteps(20)
    grid = Trailing()(20, TABLE)
    if last == "sigma_min":
        grid[-1] = 0.001
    # It does not correct its last step, which costs a call; on a grid that ends at 0 nor do we.
    steps = len(grid) - 1 if last == "zero" else len(grid) - 2
    scheduler.timesteps = scheduler.timesteps[:steps]
    expected = theirs(scheduler, NOISE.normal(SHAPE))
    got = ours(UniPC(solver_order=order), grid[: steps + 1])
    if last == "sigma_min":
        expected = corrected(scheduler, expected)
    close(got, expected)


def corrected(scheduler: Any, x: Tensor) -> Tensor:
    """The correction that diffusers makes at the start of the next step."""
    t = torch.tensor(49)
    m = scheduler.convert_model_output(network(x, t), sample=x)
    return scheduler.multistep_uni_c_bh_update(
        this_model_output=m, last_sample=scheduler.last_sample, this_sample=x, order=scheduler.this_order
    )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order: int) -> None:
    scheduler = diffusers.DEISMultistepScheduler(**COMMON, solver_order=order, lower_order_final=False)
    scheduler.set_timesteps(20)
    grid = Trailing()(20, TABLE)
    grid[-1] = 0.001
    close(ours(DEIS(solver_order=order), grid), theirs(scheduler, NOISE.normal(SHAPE)))


def test_pndm() -> None:
    """Stable Diffusion's PLMS, with its last step onto the data."""
    scheduler = diffusers.PNDMScheduler(**COMMON, skip_prk_steps=True, set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    close(ours(PNDM(), Trailing()(20, TABLE)), theirs(scheduler, NOISE.normal(SHAPE)))


def test_ipndm() -> None:
    """Its process is `gvp` on a grid of its own, its network is told t and answers v."""
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(20)
    # From pure noise, where it divides by alpha = 0, it is wrong (see `test_diffusers_faults`): a step later, both.
    grid = torch.cat([scheduler.timesteps[1:].double(), torch.zeros(1, dtype=torch.float64)])
    scheduler.timesteps = scheduler.timesteps[1:]
    scheduler.set_begin_index(0)
    scheduler.betas, scheduler.alphas = scheduler.betas[1:], scheduler.alphas[1:]
    expected = theirs(scheduler, NOISE.normal(SHAPE), model=lambda x, t: network(x, 1000 * t))
    close(ours(IPNDM(), grid, GVP(), V()), expected)


def test_flow_matching_euler() -> None:
    for shift in (1.0, 3.0):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20))
        expected = theirs(scheduler, NOISE.normal(SHAPE))
        close(ours(Euler(), Uniform(shift=shift)(20, Flow()), Flow(), Velocity()), expected)


def test_flow_matching_heun() -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(20)
    grid = torch.cat([torch.linspace(1, 0.001, 20, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    close(ours(Heun(), grid, Flow(), Velocity()), theirs(scheduler, NOISE.normal(SHAPE)))


class Mended(diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """Theirs, with D2 twice what it is, the second derivative, as in their own singlestep rule of order 3; and on the
    SDE with + 0.5 for - 0.5 in its weight."""

    def multistep_dpm_solver_third_order_update(self, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        x = super().multistep_dpm_solver_third_order_update(outputs, *args, **kwargs)
        sigmas = [self.sigmas[self.step_index + offset] for offset in (1, 0, -1, -2)]
        alphas, levels = zip(*(self._sigma_to_alpha_sigma_t(sigma) for sigma in sigmas), strict=True)
        lambdas = [(alpha / level).log() for alpha, level in zip(alphas, levels, strict=True)]
        h, h0, h1 = (lambdas[i] - lambdas[i + 1] for i in range(3))
        r0, r1 = h0 / h, h1 / h
        second = ((outputs[-1] - outputs[-2]) / r0 - (outputs[-2] - outputs[-3]) / r1) / (r0 + r1)
        if self.config.algorithm_type == "dpmsolver++":
            return x - alphas[0] * (((-h).exp() - 1 + h) / h**2 - 0.5) * second
        weight = (1 - (-2 * h).exp() - 2 * h) / (2 * h) ** 2
        return x + alphas[0] * (2 * (weight + 0.5) - (weight - 0.5)) * second


@pytest.mark.parametrize(("sampler", "algorithm"), [(DPMpp3M(), "dpmsolver++"), (DPMppSDE3M(), "sde-dpmsolver++")])
def test_dpm_solver_three_is_theirs_mended(sampler: Sampler, algorithm: str) -> None:
    # Its "heun" second step is the line through two estimates, integrated exactly, as ours is.
    options = {"algorithm_type": algorithm, "solver_order": 3, "solver_type": "heun", "lower_order_final": False}
    scheduler = Mended(**COMMON, **options, final_sigmas_type="zero")
    scheduler.set_timesteps(20)
    noises = step_noise(20) if isinstance(sampler, DPMppSDE3M) else None
    close(ours(sampler, Trailing()(20, TABLE)), theirs(scheduler, NOISE.normal(SHAPE), noises))


def test_the_prior_is_their_initial_noise() -> None:
    for schedule in (TABLE, Flow()):
        assert torch.equal(prior(schedule, SHAPE, NOISE), NOISE.normal(SHAPE, "prior"))
