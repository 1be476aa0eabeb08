"""diffusers' scheduler_config.json -> [schedule], [prediction], [sampler] and [grid]; what has no counterpart goes into
the ledger where it changes how pictures are drawn, and is refused where it changes what the network was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.schedules import Table
from training.errors import CHECKPOINT, UserError
from training.exchange.layout import foreign
from training.ledger import Ledger
from training.settings import decoding

Settings = dict[str, Any]

# prediction_type -> ours, on a table and on flow matching; the first is meant where none is said.
PREDICTIONS = ({"epsilon": "eps", "v_prediction": "v", "sample": "x0"},
               {"flow_prediction": "velocity", "sample": "x0"})  # fmt: skip
TABLES = {"linear": "ddpm-linear", "scaled_linear": "ddpm-scaled-linear", "squaredcos_cap_v2": "ddpm-cosine",
          "sigmoid": "ddpm-sigmoid"}  # fmt: skip
OWN_TABLE = "_schedule"  # [schedule] beside trained_betas, of our export; diffusers passes such names over
SIGMA = {"variable": "sigma"}
# Each class's sampler here, and its timestep_spacing where config.json states none.
SAMPLERS: dict[str, tuple[Settings, str]] = {
    "DDIMScheduler": ({"kind": "ddim"}, "leading"),
    "DDPMScheduler": ({"kind": "ddpm"}, "leading"),
    "PNDMScheduler": ({"kind": "pndm"}, "leading"),
    "EulerDiscreteScheduler": ({"kind": "euler", **SIGMA}, "linspace"),
    "EulerAncestralDiscreteScheduler": ({"kind": "ddim", "eta": 1.0}, "linspace"),
    "HeunDiscreteScheduler": ({"kind": "heun", **SIGMA}, "linspace"),
    "LMSDiscreteScheduler": ({"kind": "lms"}, "linspace"),
    "DPMSolverMultistepScheduler": ({"kind": "dpmpp-2m"}, "linspace"),
    "UniPCMultistepScheduler": ({"kind": "unipc"}, "linspace"),
    "DEISMultistepScheduler": ({"kind": "deis"}, "linspace"),
    "FlowMatchEulerDiscreteScheduler": ({"kind": "euler"}, "linspace"),
    "FlowMatchHeunDiscreteScheduler": ({"kind": "heun"}, "linspace"),
}
ROUNDED = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")  # whose linspace is of entries of the table, 0 among them
DPM = {("dpmsolver++", 1): "ddim", ("dpmsolver++", 2): "dpmpp-2m", ("dpmsolver++", 3): "dpmpp-3m",
       ("sde-dpmsolver++", 1): "ddpm", ("sde-dpmsolver++", 2): "dpmpp-sde-2m",
       ("sde-dpmsolver++", 3): "dpmpp-sde-3m"}  # fmt: skip
VARIANCES = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "fixed_large_log": "large",
             "learned_range": "learned"}  # fmt: skip


@dataclass(frozen=True)
class Process:
    """The sections of a config that say what a network was trained for, and by which rule it draws."""

    schedule: Settings
    prediction: Settings
    sampler: Settings
    grid: Settings


def read_scheduler(about: Mapping[str, Any], ledger: Ledger, learned_variance: bool = False) -> Process:
    """Of a scheduler_config.json. `learned_variance`: the network answers one.

    Raises UserError for processes that networks here are not trained for, naming the setting.
    """
    name = str(about.get("_class_name", ""))
    flow = name.startswith("FlowMatch") or bool(about.get("use_flow_sigmas"))
    if not flow and "beta_schedule" not in about and name not in SAMPLERS:
        raise foreign(f"scheduler {name or 'without a _class_name'}", f"{', '.join(SAMPLERS)} are read")
    sampler, spacing = SAMPLERS.get(name, ({"kind": "ddim"}, "leading"))
    if name not in SAMPLERS:
        ledger.add("replaced", "a scheduler that is not known here, by DDIM", name)
    return Process(
        schedule=_flow_schedule(about) if flow else _schedule(about),
        prediction={"kind": _prediction(about, flow)},
        sampler=_sampler(name, dict(sampler), about, learned_variance, ledger),
        grid=_flow_grid(about, ledger) if flow else _grid(name, about.get("timestep_spacing", spacing), about, ledger),
    )


def _flow_schedule(about: Mapping[str, Any]) -> Settings:
    """Raises UserError where the network is told another multiple of sigma: 1000 t is fixed here."""
    if (steps := about.get("num_train_timesteps", 1000)) != 1000:
        raise foreign(f"num_train_timesteps = {steps!r} on flow matching", "1000 is read")
    return {"kind": "flow"}


def _schedule(about: Mapping[str, Any]) -> Settings:
    """The table. Raises UserError for one by a rule that is not known."""
    if about.get("timestep_type") == "continuous":
        raise foreign("timestep_type = 'continuous'", "networks that are told the entry of a table are read")
    if about.get("trained_betas"):
        return _listed(about)
    rule = about.get("beta_schedule", "linear")
    if rule not in TABLES:
        raise foreign(f"beta_schedule = {rule!r}", f"{', '.join(TABLES)} are read")
    table = {"kind": TABLES[rule], "steps": about.get("num_train_timesteps", 1000),
             "zero_terminal_snr": bool(about.get("rescale_betas_zero_snr"))}  # fmt: skip
    usual = (0.00085, 0.012) if about.get("_class_name") == "HeunDiscreteScheduler" else (0.0001, 0.02)
    ends = {"beta_min": float(about.get("beta_start", usual[0])), "beta_max": float(about.get("beta_end", usual[1]))}
    return table if rule == "squaredcos_cap_v2" else table | ends


def _listed(about: Mapping[str, Any]) -> Settings:
    """trained_betas by the rule that gives them: what our export says beside them, or one of `rule_of`. Raises
    UserError where there is none."""
    hint = "tables by a beta_schedule are read, and those that our export wrote"
    try:
        alpha_bar = (1 - torch.tensor(about["trained_betas"], dtype=torch.float64)).cumprod(0)
    except (TypeError, ValueError, RuntimeError):
        raise foreign("trained_betas that are not a list of numbers", hint) from None
    if (steps := about.get("num_train_timesteps", 1000)) != len(alpha_bar):
        raise foreign(f"trained_betas of {len(alpha_bar)} entries where num_train_timesteps is {steps!r}", hint)
    own, zero = about.get(OWN_TABLE), bool(about.get("rescale_betas_zero_snr"))
    if isinstance(own, dict) and not zero and _gives(own, alpha_bar):
        return own
    if rule := rule_of(alpha_bar):
        return rule | {"zero_terminal_snr": zero}
    raise foreign("the table trained_betas", hint)


def _gives(own: Settings, alpha_bar: Tensor) -> bool:
    """Whether a `[schedule]` is this table."""
    try:  # any prediction that every table can have
        table = decoding.decode("denoiser", {"schedule": own, "prediction": {"kind": "v"}}).schedule  # type: ignore[union-attr]
    except UserError:
        return False
    if not isinstance(table, Table) or table.steps != len(alpha_bar):
        return False
    return torch.allclose(table.alpha_bar(), alpha_bar, rtol=1e-6, atol=1e-9)


def rule_of(alpha_bar: Tensor) -> Settings | None:
    """[schedule] of a table of alpha_bar, float64, that is linear in beta or in its root; None of any other."""
    betas = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    ends = [round(float(beta), 8) for beta in (betas[0], betas[-1])]
    for kind, root in (("ddpm-scaled-linear", 0.5), ("ddpm-linear", 1.0)):
        rule = torch.linspace(ends[0] ** root, ends[1] ** root, len(betas), dtype=torch.float64) ** (1 / root)
        if torch.allclose((1 - rule).cumprod(0), alpha_bar, rtol=1e-3, atol=1e-5):
            return {"kind": kind, "steps": len(betas), "beta_min": ends[0], "beta_max": ends[1]}
    return None


def _prediction(about: Mapping[str, Any], flow: bool) -> str:
    known = PREDICTIONS[flow]
    said = about.get("prediction_type", next(iter(known)))
    if str(about.get("_class_name")).startswith("FlowMatch"):
        said = "flow_prediction"
    if said not in known:
        where = "flow matching" if flow else "a table of betas"
        raise foreign(f"prediction_type = {said!r} on {where}", f"{', '.join(known)} are read")
    return known[said]


def _sampler(name: str, sampler: Settings, about: Mapping[str, Any], learned: bool, ledger: Ledger) -> Settings:
    """The rule of a step; what of it differs goes into the ledger."""
    order = about.get("solver_order", 2)
    if name == "DPMSolverMultistepScheduler":
        algorithm = about.get("algorithm_type", "dpmsolver++")
        if (algorithm, order) not in DPM:
            ledger.add("replaced", f"algorithm_type of order {order}, by dpmpp-2m", str(algorithm))
        sampler = {"kind": DPM.get((algorithm, order), "dpmpp-2m")}
        if about.get("solver_type", "midpoint") != "midpoint" and order == 2:
            ledger.add("replaced", "solver_type, by midpoint", str(about["solver_type"]))
        if order == 3:
            ledger.add("replaced", "the third-order rule, by one whose last term is whole", str(algorithm))
    elif name in ("UniPCMultistepScheduler", "DEISMultistepScheduler"):
        sampler |= {"solver_order": order}
    elif name == "DDPMScheduler":
        sampler |= {"variance": _variance(str(about.get("variance_type", "fixed_small")), learned, ledger)}
    elif name == "PNDMScheduler" and not about.get("skip_prk_steps", False):
        ledger.add("replaced", "the first steps by Runge-Kutta, by PLMS", "skip_prk_steps = false")
    clips = about.get("clip_sample", name in ("DDIMScheduler", "DDPMScheduler"))
    for setting in [*(["clip_sample"] if clips else []), *(["thresholding"] if about.get("thresholding") else [])]:
        ledger.add("ignored", "a bound on x0, which latents here do not have", setting)
    ends_on_table = not about.get("set_alpha_to_one", name != "PNDMScheduler")
    if ends_on_table or about.get("final_sigmas_type", "zero") != "zero":
        setting = "set_alpha_to_one = false" if ends_on_table else f"final_sigmas_type = {about['final_sigmas_type']}"
        ledger.add("replaced", "a last step that leaves the noise of the table's first entry, by one onto x0", setting)
    return sampler


def _variance(said: str, learned: bool, ledger: Ledger) -> str:
    ours = VARIANCES.get(said, "small")
    if said not in VARIANCES or (ours == "learned" and not learned):
        ledger.add("replaced", "variance_type, by fixed_small", said)
        return "small"
    return ours


def _grid(name: str, spacing: str, about: Mapping[str, Any], ledger: Ledger) -> Settings:
    """The times that are visited."""
    if about.get("use_karras_sigmas") or about.get("use_exponential_sigmas"):
        if spacing != "linspace":
            ledger.add("replaced", "the ends of the noise levels, by those of the whole table", f"{spacing} spacing")
        ends = {"sigma_min": 0.002, "sigma_max": 80.0}  # cut to the table's own
        return {"kind": "karras" if about.get("use_karras_sigmas") else "exponential", **ends}
    for odd in ("use_beta_sigmas", "use_lu_lambdas"):
        if about.get(odd):
            ledger.add("replaced", f"noise levels of a rule that is not known here, by {spacing}", odd)
    if spacing == "leading":
        offset = about.get("steps_offset", 0)
        if offset not in (0, 1):
            ledger.add("replaced", "steps_offset, by 1", str(offset))
        return {"kind": "leading", "offset": min(int(bool(offset)), 1)}
    if spacing == "linspace" and name not in ROUNDED:
        multistep = name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
        near = "trailing" if multistep else "linspace"
        ledger.add("replaced", f"timesteps of linspace, by entries of {near} at most one apart", name)
        return {"kind": near}
    if spacing not in ("linspace", "trailing"):
        raise foreign(f"timestep_spacing = {spacing!r}", "leading, linspace and trailing are read")
    return {"kind": spacing}


def _flow_grid(about: Mapping[str, Any], ledger: Ledger) -> Settings:
    """Equal steps of t, shifted. Raises UserError where noise and data are the other way round."""
    if about.get("invert_sigmas"):
        raise foreign("invert_sigmas", "schedulers that go from sigma 1, noise, to 0 are read")
    shift = float(about.get("shift", about.get("flow_shift", 1.0)) or 1.0)
    for odd in ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
                "shift_terminal", "stochastic_sampling"):  # fmt: skip
        if about.get(odd):
            ledger.add("replaced", f"noise levels of a rule that is not known here, by shift {shift:g}", odd)
    return {"kind": "uniform", "shift": shift}


def need_prediction(said: str | None, process: Process, ledger: Ledger, source: str) -> Process:
    """The process with what `--prediction` says. Raises UserError where its schedule has no such prediction."""
    if said is None or said == process.prediction["kind"]:
        return process
    if said not in PREDICTIONS[process.schedule["kind"] == "flow"].values():
        hint = "leave --prediction out, or give velocity or x0 for flow matching and eps, v or x0 for a table of betas"
        raise UserError(f"--prediction {said}: {source} is on schedule {process.schedule['kind']}", hint=hint,
                        code=CHECKPOINT)  # fmt: skip
    ledger.add("replaced", f"the prediction, by --prediction {said}", process.prediction["kind"])
    return Process(process.schedule, {"kind": said}, process.sampler, process.grid)
