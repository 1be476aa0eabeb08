"""The training process of a denoiser as a scheduler of diffusers': its class, and what scheduler_config.json says."""

from __future__ import annotations

from typing import Any

from ldm.grids import Grid, Leading, Linspace, Trailing, Uniform
from ldm.schedules import DDPMCosine, DDPMLinear, DDPMScaledLinear, Flow, Table
from training.exchange.export_limits import PREDICTIONS
from training.exchange.scheduler_import import OWN_TABLE, TABLES
from training.messages import note
from training.settings.decoding import DenoiserConfig

RULES = {kind: rule for rule, kind in TABLES.items()}  # of tables that diffusers builds itself, to float32
SPACINGS: dict[type, str] = {Leading: "leading", Trailing: "trailing", Linspace: "linspace"}


def scheduler(config: DenoiserConfig) -> tuple[str, dict[str, Any]]:
    """(class, settings) with the betas, the prediction and the steps of a config that `obstacles` has nothing against.

    A table is walked by DDIMScheduler, with a learned variance that the pipeline does not split off by DDPMScheduler;
    `flow` by DPMSolverMultistepScheduler, which has the sigmas of flow matching and which pipelines take.
    """
    prediction = PREDICTIONS[type(config.schedule) is Flow][config.prediction.kind]
    _tell_grid(config)
    if isinstance(config.schedule, Table):
        return _table(config, config.schedule, prediction)
    return "DPMSolverMultistepScheduler", {
        "num_train_timesteps": config.schedule.steps,
        "prediction_type": prediction,
        "use_flow_sigmas": True,
        "flow_shift": getattr(walked(config), "shift", 1.0),
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "final_sigmas_type": "zero",
        "steps_offset": _offset(config),
    }


def _table(config: DenoiserConfig, table: Table, prediction: str) -> tuple[str, dict[str, Any]]:
    """The last step goes to the clean end: `set_alpha_to_one`, as `ldm.samplers` does, and as DDPMScheduler always."""
    common = {
        **_betas(table),
        "num_train_timesteps": table.steps,
        "prediction_type": prediction,
        "clip_sample": False,
        "timestep_spacing": SPACINGS[type(walked(config))],
        "steps_offset": _offset(config),
    }
    # Pipelines for text split the variance off for PixArt alone; DDIMScheduler would take it for channels.
    if config.backbone.learned_variance and config.backbone.kind == "unet":
        return "DDPMScheduler", common | {"variance_type": "learned_range"}
    return "DDIMScheduler", common | {"set_alpha_to_one": True}


def walked(config: DenoiserConfig) -> Grid:
    """The grid that is written: the run's own, or the nearest that the pipeline's scheduler has."""
    grid = config.grid
    if not isinstance(config.schedule, Table):
        return grid if isinstance(grid, Uniform) else Uniform()
    if isinstance(grid, Leading) and config.backbone.kind == "unet":
        return Leading(offset=1)
    return grid if type(grid) in SPACINGS else Trailing()


def _tell_grid(config: DenoiserConfig) -> None:
    """What is walked otherwise than on the run's grid; not where only the rounding of times differs."""
    grid, theirs = config.grid, walked(config)
    if isinstance(grid, Leading) and isinstance(theirs, Leading) and grid != theirs:
        note("StableDiffusionPipeline has no grid leading with offset 0: each of its steps visits the entry after ours")
    even = isinstance(grid, Trailing) or (isinstance(grid, Uniform) and grid.shift == 1)  # but for rounding
    if type(grid) is type(theirs) or even:
        return
    if isinstance(config.schedule, Table):
        note(f"diffusers' DDIMScheduler has no grid {grid.kind}: timestep_spacing trailing is written")
    else:
        note(f"diffusers' sigmas of flow matching have no grid {grid.kind}: flow_shift 1, equal steps of t, is written")


def _offset(config: DenoiserConfig) -> int:
    """What `leading` adds to each entry; other rules pass it over. StableDiffusionPipeline sets it to 1, whatever it is
    given, and advises so."""
    return 1 if config.backbone.kind == "unet" else int(getattr(config.grid, "offset", 0))


def _betas(table: Table) -> dict[str, Any]:
    """The rule of a table by its name where DDIMScheduler has it; else all of its betas, and beside them our settings,
    for our own import."""
    if table.shift == 1:
        ends: dict[str, Any] = {"rescale_betas_zero_snr": table.zero_terminal_snr}
        if isinstance(table, DDPMCosine) and (table.s, table.max_beta) == (0.008, 0.999):
            return ends | {"beta_schedule": RULES[table.kind]}
        if isinstance(table, DDPMLinear | DDPMScaledLinear):
            ends |= {"beta_start": table.beta_min, "beta_end": table.beta_max}
            return ends | {"beta_schedule": RULES[table.kind]}
    kept = table.alpha_bar()
    ratios = kept / kept.roll(1).index_fill(0, kept.new_zeros(1).long(), 1.0)
    return {"trained_betas": (1 - ratios).tolist(), "rescale_betas_zero_snr": False,
            OWN_TABLE: vars(table)}  # fmt: skip

