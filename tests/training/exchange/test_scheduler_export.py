"""Our processes as schedulers of diffusers': the same table, the same sigmas, and read back as what they were."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peers import diffusers
from portable import FLOW, PIXART, UNET

from ldm.schedules import Table
from training.errors import UserError
from training.exchange.scheduler_export import scheduler
from training.exchange.scheduler_import import OWN_TABLE, read_scheduler
from training.ledger import Ledger
from training.settings import decoding

TABLES: dict[str, dict[str, Any]] = {
    "linear": {"kind": "ddpm-linear"},
    "scaled": {"kind": "ddpm-scaled-linear", "beta_max": 0.02, "steps": 200},
    "cosine": {"kind": "ddpm-cosine"},
    "cosine of its own": {"kind": "ddpm-cosine", "s": 0.02},
    "sigmoid": {"kind": "ddpm-sigmoid"},
    "shifted": {"kind": "ddpm-cosine", "shift": 3.0},
    "zero": {"kind": "ddpm-scaled-linear", "zero_terminal_snr": True},
    "zero, sigmoid and shifted": {"kind": "ddpm-sigmoid", "zero_terminal_snr": True, "shift": 0.5},
}


@pytest.mark.parametrize("name", TABLES)
def test_a_scheduler_has_our_table(name: str) -> None:
    values = {"backbone": PIXART, "schedule": TABLES[name], "prediction": {"kind": "v"}, "format": {"version": 3}}
    config: Any = decoding.decode_stored("denoiser", values)
    kind, settings = scheduler(config)
    peer = getattr(diffusers, kind)(**settings)
    assert isinstance(config.schedule, Table)
    wanted = config.schedule.alpha_bar().float()
    torch.testing.assert_close(peer.alphas_cumprod, wanted, rtol=0, atol=2e-6)
    assert float(peer.alphas_cumprod[-1]) < 1e-12 or not config.schedule.zero_terminal_snr
    assert (peer.config.clip_sample, float(peer.final_alpha_cumprod)) == (False, 1.0)
    assert ("trained_betas" in settings) == ("own" in name or "sigmoid" in name or "shifted" in name)


def test_a_flow_scheduler_has_our_shift() -> None:
    values = {"backbone": PIXART, **FLOW, "grid": {"kind": "uniform", "shift": 3.0}, "format": {"version": 3}}
    config: Any = decoding.decode_stored("denoiser", values)
    kind, settings = scheduler(config)
    peer = getattr(diffusers, kind)(**settings)
    peer.set_timesteps(8)
    wanted = config.grid(8, config.schedule).float()
    torch.testing.assert_close(peer.sigmas, wanted, rtol=0, atol=2e-3)  # it begins at 0.999
    assert (peer.sigmas[0], peer.sigmas[-1]) == (pytest.approx(0.9997, abs=1e-3), 0)


@pytest.mark.parametrize(("sections", "said"), [
    (FLOW | {"grid": {"kind": "karras"}}, "have no grid karras: flow_shift 1, equal steps of t, is written"),
    (FLOW | {"grid": {"kind": "leading"}}, "have no grid leading: flow_shift 1"),
    (FLOW | {"grid": {"kind": "uniform", "shift": 3.0}}, ""), (FLOW | {"grid": {"kind": "trailing"}}, ""),
    ({"grid": {"kind": "karras"}}, "has no grid karras: timestep_spacing trailing is written"),
    ({"grid": {"kind": "uniform"}}, ""), ({"grid": {"kind": "leading", "offset": 0}}, ""),
    ({"grid": {"kind": "leading", "offset": 0}, "backbone": UNET}, "no grid leading with offset 0"),
])  # fmt: skip
def test_a_grid_that_is_not_held_is_told(
    sections: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"backbone": PIXART, "schedule": {"kind": "ddpm-linear"}, "prediction": {"kind": "eps"}} | sections
    scheduler(decoding.decode_stored("denoiser", given | {"format": {"version": 3}}))  # type: ignore[arg-type]
    told = capsys.readouterr().err
    assert said in told and bool(told) == bool(said)


PROCESSES: dict[str, dict[str, Any]] = {
    **{name: {"schedule": table, "prediction": {"kind": "v"}} for name, table in TABLES.items()},
    "eps": {}, "x0": {"prediction": {"kind": "x0"}, "grid": {"kind": "linspace"}},
    "leading": {"grid": {"kind": "leading", "offset": 1}}, "leading from 0": {"grid": {"kind": "leading", "offset": 0}},
    "flow": FLOW | {"grid": {"kind": "uniform", "shift": 3.0}},
    "flow, x0": FLOW | {"prediction": {"kind": "x0"}, "grid": {"kind": "uniform"}},
    "learned variance": {"backbone": UNET | {"learned_variance": True}, "grid": {"kind": "leading", "offset": 1}},
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSES)
def test_what_is_written_is_read_again(name: str) -> None:
    """Schedule, prediction and grid as they were, and nothing to tell; without diffusers exports are judged by it."""
    given = {"schedule": {"kind": "ddpm-linear"}, "prediction": {"kind": "eps"}, "sampler": {"kind": "ddim"}}
    given |= {"grid": {"kind": "trailing"}} | PROCESSES[name]
    config: Any = decoding.decode_stored("denoiser", {"backbone": PIXART, "format": {"version": 3}} | given)
    kind, settings = scheduler(config)
    ledger = Ledger()
    process = read_scheduler(json.loads(json.dumps({"_class_name": kind} | settings)), ledger, kind == "DDPMScheduler")
    again: Any = decoding.decode("denoiser", vars(process))
    assert (again.schedule, again.prediction, again.grid) == (config.schedule, config.prediction, config.grid)
    assert ledger.count() == 0
    assert (process.sampler.get("variance") == "learned") == (name == "learned variance")


def listed(**changes: Any) -> dict[str, Any]:
    """A scheduler's settings with the betas of a table of ours that diffusers has no name for."""
    values = {"backbone": PIXART, "schedule": TABLES["sigmoid"], "prediction": {"kind": "v"}, "format": {"version": 3}}
    kind, settings = scheduler(decoding.decode_stored("denoiser", values))  # type: ignore[arg-type]
    return {"_class_name": kind} | settings | changes


def test_betas_of_other_programs_are_read_where_a_rule_gives_them() -> None:
    plain = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.01)
    betas = {"trained_betas": plain.betas.tolist(), "beta_schedule": "linear"}
    process = read_scheduler(listed(**betas), Ledger())
    wanted = {"kind": "ddpm-scaled-linear", "steps": 1000, "zero_terminal_snr": False}
    assert process.schedule == wanted | {"beta_min": pytest.approx(0.001), "beta_max": pytest.approx(0.01)}
    assert read_scheduler(listed(**betas, rescale_betas_zero_snr=True), Ledger()).schedule["zero_terminal_snr"]


@pytest.mark.parametrize(("changes", "said"), [
    *(({OWN_TABLE: own}, "the table trained_betas") for own in (
        None, {"kind": "ddpm-cosine"}, {"kind": "no"}, {"kind": "flow"}, {"kind": "ddpm-sigmoid", "steps": 10})),
    ({"rescale_betas_zero_snr": True}, "the table trained_betas"), ({"trained_betas": "x"}, "not a list of numbers"),
    ({"trained_betas": [0.1, 0.2]}, "of 2 entries where num_train_timesteps is 1000"),
])  # fmt: skip
def test_betas_of_no_rule_are_refused(changes: dict[str, Any], said: str) -> None:
    """Settings beside the betas count only where they give them."""
    with pytest.raises(UserError, match="has no counterpart here") as refused:
        read_scheduler(listed(**changes), Ledger())
    assert said in refused.value.what and "our export" in refused.value.hint
