"""scheduler_config.json read: the process and the steps are diffusers', and what is not is in the ledger or refused."""

from __future__ import annotations

import json
from typing import Any

import peers
import pytest
import torch
from torch import Tensor

from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.noise import Noise
from ldm.samplers import sample
from training.errors import UserError
from training.exchange.scheduler_import import SAMPLERS, Process, need_prediction, read_scheduler
from training.ledger import Ledger
from training.settings import decoding

diffusers = peers.diffusers
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAILING = SCALED | {"timestep_spacing": "trailing"}
NOISE, SHAPE, STEPS = Noise.from_seeds([1, 2]), (2, 4, 4), 20


def network(x: Tensor, level: Tensor, cond: object = None) -> Tensor:
    """Any smooth function of x and the noise level will do."""
    level = torch.as_tensor(level).float().reshape(-1, *[1] * (x.ndim - 1))
    return 0.8 * torch.tanh(1.3 * x) + 0.2 * torch.sin(level / 150) * torch.cos(x)


def about(scheduler: Any) -> dict[str, Any]:
    return dict(json.loads(scheduler.to_json_string()))


def config_of(process: Process, steps: int = STEPS) -> Any:
    values = {"schedule": process.schedule, "prediction": process.prediction, "sampler": process.sampler,
              "grid": process.grid, "sample": {"steps": steps}}  # fmt: skip
    return decoding.decode("denoiser", values)


def ours(process: Process) -> Tensor:
    config = config_of(process)
    denoiser = Denoiser(network, Diffusion(schedule=config.schedule, prediction=config.prediction))  # type: ignore[arg-type]
    start, grid = NOISE.normal(SHAPE), config.grid(STEPS, config.schedule)
    return sample(config.sampler, denoiser.bind(None), start, grid, NOISE)  # type: ignore[arg-type]


def theirs(scheduler: Any, sigma_space: bool = False) -> Tensor:
    """diffusers' own loop; its x in sigma space is ours over alpha."""
    scheduler.set_timesteps(STEPS)
    x = NOISE.normal(SHAPE)
    if sigma_space:
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(inputs, t), t, x).prev_sample
    return x


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", TRAILING | {"clip_sample": False}),
    "ddim, leading": ("DDIMScheduler", SCALED | {"clip_sample": False, "steps_offset": 1}),
    "ddim, v": ("DDIMScheduler", TRAILING | {"clip_sample": False, "prediction_type": "v_prediction",
                                             "rescale_betas_zero_snr": True}),
    "ddim, x0 on cosine": ("DDIMScheduler", {"clip_sample": False, "prediction_type": "sample",
                                             "beta_schedule": "squaredcos_cap_v2"}),
    "ddim of 500": ("DDIMScheduler", {"clip_sample": False, "num_train_timesteps": 500}),
    "pndm": ("PNDMScheduler", SCALED | {"skip_prk_steps": True, "set_alpha_to_one": True, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", TRAILING),
    "euler, leading": ("EulerDiscreteScheduler", SCALED | {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler, karras": ("EulerDiscreteScheduler", SCALED | {"use_karras_sigmas": True}),
    "heun": ("HeunDiscreteScheduler", TRAILING),
    "lms": ("LMSDiscreteScheduler", TRAILING),
    "dpm": ("DPMSolverMultistepScheduler", TRAILING),
    "dpm of order 1": ("DPMSolverMultistepScheduler", TRAILING | {"solver_order": 1}),
    "unipc": ("UniPCMultistepScheduler", TRAILING),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_steps_are_theirs(case: str) -> None:
    name, settings = CASES[case]
    scheduler, ledger = getattr(diffusers, name)(**settings), Ledger()
    process = read_scheduler(about(scheduler), ledger)
    in_sigma = name.startswith(("Euler", "Heun", "LMS"))
    torch.testing.assert_close(ours(process), theirs(scheduler, in_sigma), atol=2e-5, rtol=2e-5)
    assert ledger.count() == 0


def test_euler_ancestral_is_ddim_of_eta_1(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, ledger = diffusers.EulerAncestralDiscreteScheduler(**TRAILING), Ledger()
    draws = iter([*(NOISE.fold("step", i).normal(SHAPE) for i in range(STEPS))])
    place = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
    monkeypatch.setattr(place, lambda *args, **kwargs: next(draws))
    process = read_scheduler(about(scheduler), ledger)
    torch.testing.assert_close(ours(process), theirs(scheduler, True), atol=2e-5, rtol=2e-5)


def test_the_table_is_theirs() -> None:
    for rule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        for zero in (False, True):
            settings = {"beta_schedule": rule, "beta_start": 0.001, "beta_end": 0.02, "rescale_betas_zero_snr": zero}
            scheduler = diffusers.DDIMScheduler(**settings, clip_sample=False, prediction_type="v_prediction")
            schedule = config_of(read_scheduler(about(scheduler), Ledger())).schedule
            torch.testing.assert_close(schedule.alpha_bar().float(), scheduler.alphas_cumprod, atol=1e-5, rtol=1e-4)


def test_of_a_file_that_says_little() -> None:
    """Where config.json is silent, the class's own defaults are meant."""
    for name in SAMPLERS:
        short, whole = Ledger(), Ledger()
        process = read_scheduler({"_class_name": name}, short)
        assert process == read_scheduler(about(getattr(diffusers, name)()), whole), name
        assert short.report() == whole.report(), name


def test_flow(capsys: pytest.CaptureFixture[str]) -> None:
    for scheduler in (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)):  # fmt: skip
        process = read_scheduler(about(scheduler), Ledger())
        assert process.schedule == {"kind": "flow"} and process.prediction == {"kind": "velocity"}
        assert process.grid == {"kind": "uniform", "shift": 3.0}
        assert process.sampler["kind"] in ("euler", "dpmpp-2m")
        config_of(process)


TOLD: dict[str, tuple[str, dict[str, Any], str]] = {
    "clip": ("DDIMScheduler", {}, "ignored 1: a bound on x0, which latents here do not have (clip_sample)"),
    "clip of ddpm": ("DDPMScheduler", {}, "ignored 1: a bound on x0"),
    "thresholding": ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, "(thresholding)"),
    "end": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}, "(set_alpha_to_one = false)"),
    "end of pndm": ("PNDMScheduler", {"skip_prk_steps": True}, "(set_alpha_to_one = false)"),
    "end of dpm": ("DPMSolverMultistepScheduler", TRAILING | {"final_sigmas_type": "sigma_min"}, "sigma_min)"),
    "prk": ("PNDMScheduler", {"set_alpha_to_one": True}, "by PLMS (skip_prk_steps = false)"),
    "offset": ("DDIMScheduler", {"clip_sample": False, "steps_offset": 3}, "replaced 1: steps_offset, by 1 (3)"),
    "linspace": ("EulerDiscreteScheduler", {}, "by entries of linspace at most one apart"),
    "linspace of dpm": ("DPMSolverMultistepScheduler", {}, "by entries of trailing at most one apart"),
    "algorithm": ("DPMSolverMultistepScheduler", TRAILING | {"solver_order": 4}, "order 4, by dpmpp-2m (dpmsolver++)"),
    "order": ("DPMSolverMultistepScheduler", TRAILING | {"solver_order": 3}, "the third-order rule"),
    "solver": ("DPMSolverMultistepScheduler", TRAILING | {"solver_type": "heun"}, "solver_type, by midpoint (heun)"),
    "beta": ("EulerDiscreteScheduler", TRAILING | {"use_beta_sigmas": True}, "(use_beta_sigmas)"),
    "karras": ("EulerDiscreteScheduler", TRAILING | {"use_karras_sigmas": True}, "those of the whole table"),
    "variance": ("DDPMScheduler", {"clip_sample": False, "variance_type": "learned_range"}, "by fixed_small"),
    "class": ("LCMScheduler", {"clip_sample": False, "set_alpha_to_one": True}, "by DDIM (LCMScheduler)"),
    "shift": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "(use_dynamic_shifting)"),
}


@pytest.mark.parametrize("case", TOLD)
def test_what_is_drawn_otherwise_is_told(case: str) -> None:
    name, settings, said = TOLD[case]
    ledger = Ledger()
    config_of(read_scheduler(about(getattr(diffusers, name)(**settings)), ledger))
    assert len(ledger.lines()) == 1 and said in ledger.lines()[0], ledger.lines()


def test_a_learned_variance_is_kept() -> None:
    about = {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "clip_sample": False}
    ledger = Ledger()
    assert read_scheduler(about, ledger, True).sampler == {"kind": "ddpm", "variance": "learned"}
    assert ledger.count() == 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "class": ({"_class_name": "KarrasVeScheduler"}, "scheduler KarrasVeScheduler"),
    "none": ({}, "without a _class_name"),
    "steps of flow": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500},
                      "num_train_timesteps = 500 on flow matching"),
    "rule": ({"_class_name": "DDIMScheduler", "beta_schedule": "laplace"}, "beta_schedule = 'laplace'"),
    "prediction": ({"_class_name": "DDIMScheduler", "prediction_type": "other"}, "prediction_type = 'other'"),
    "flow on a table": ({"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"}, "on a table of betas"),
    "eps on flow": ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "epsilon"},
                    "on flow matching"),
    "inverted": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
    "spacing": ({"_class_name": "DDIMScheduler", "timestep_spacing": "odd"}, "timestep_spacing"),
    "continuous": ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_networks_here_are_not_trained_for_is_refused(case: str) -> None:
    settings, said = REFUSED[case]
    with pytest.raises(UserError, match="has no counterpart here") as refused:
        read_scheduler(settings, Ledger())
    assert said in refused.value.what and refused.value.hint


def test_a_prediction_that_is_told() -> None:
    table = read_scheduler({"_class_name": "DDIMScheduler", "clip_sample": False}, Ledger())
    ledger = Ledger()
    assert need_prediction(None, table, ledger, "x") == need_prediction("eps", table, ledger, "x") == table
    assert ledger.count() == 0
    assert need_prediction("v", table, ledger, "x").prediction == {"kind": "v"}
    assert ledger.lines() == ["replaced 1: the prediction, by --prediction v (eps)"]
    with pytest.raises(UserError, match="--prediction velocity: x is on schedule ddpm-linear"):
        need_prediction("velocity", table, ledger, "x")
