"""A schedule and a sampler from outside the package pass every family's tests, and work with all that is in it.

Each test of a family that is run over schedules is run here with `Secant` in the place of `Flow`, which has the same
ends of time; each that is run over samplers, with `Twice` in the place of `DDIM`; and all over again with both.
"""

from __future__ import annotations

import importlib
import inspect
import math
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import test_declared
import test_grids
import test_guidance
import test_likelihood
import test_memory
import test_objective
import test_predictions
import test_properties
import test_samplers
import test_schedules
import test_shift
import test_synchronisation
import test_times
import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Denoise, Denoiser
from ldm.diffusion import Diffusion
from ldm.families import members
from ldm.grids import Karras
from ldm.guidance import ClassifierFree
from ldm.noise import Noise
from ldm.objectives import Denoising
from ldm.predictions import V
from ldm.samplers import DDIM, Memory, Sampler, mix, prior, sample
from ldm.schedules import Flow, Level
from ldm.schedules.base import Continuous
from ldm.times import LogitNormal
from ldm.weighting import ELBO

FAMILIES = (test_schedules, test_predictions, test_grids, test_objective, test_times, test_samplers, test_properties,
            test_memory, test_synchronisation, test_guidance, test_likelihood, test_declared, test_shift)


@dataclass(frozen=True, kw_only=True)
class Secant(Continuous):
    """alpha = 1 - t^2, sigma = t: neither of constant variance nor straight."""

    kind: str = "secant"
    t_min: float = 1e-4

    @property
    def pure_noise(self) -> bool:
        return True

    def __call__(self, t: Tensor) -> Level:
        return Level((1 - t) * (1 + t), t)

    def rates(self, t: Tensor) -> Level:
        return Level(-2 * t, torch.ones_like(t))

    def logsnr(self, t: Tensor) -> Tensor:
        alpha, sigma = self(t)
        return 2 * (alpha.log() - sigma.log())

    def time(self, logsnr: Tensor) -> Tensor:
        # r = (1 - t^2) / t, so t = 2 / (r + sqrt(r^2 + 4)).
        ratio = (logsnr / 2).exp()
        return 2 / (ratio + (ratio**2 + 4).sqrt())


@dataclass(frozen=True, kw_only=True)
class Twice(Sampler):
    """Two DDIM steps for one, meeting at the middle of log-SNR where there is one."""

    order = 1
    calls = 2
    rises = True
    kind: str = "twice"

    def step(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory, noise: Noise
    ) -> tuple[Tensor, Memory]:
        schedule = denoise.schedule
        middle = schedule.time((schedule.logsnr(t) + schedule.logsnr(s)) / 2)
        if not math.isfinite(middle.item()) or not min(s, t) < middle < max(s, t):
            return mix(schedule(s), denoise(x, t)), None
        return mix(schedule(s), denoise(mix(schedule(middle), denoise(x, t)), middle)), None


STANDS_FOR = ((Flow(), Secant()), (DDIM(), Twice()))


def swapped(value: object) -> object:
    """The outsider that takes a member's place, its class that of the member's class; else the value itself."""
    for old, new in STANDS_FOR:
        if value is type(old):
            return type(new)
        if type(value) is type(old) and value == old:
            return new
    return value


def rows(mark: pytest.Mark) -> list[dict[str, object]]:
    """The arguments of a parametrisation, those with an outsider in the place of its member after them."""
    names = mark.args[0].split(",") if isinstance(mark.args[0], str) else list(mark.args[0])
    values = [tuple(row) if len(names) > 1 else (row,) for row in mark.args[1]]
    new = [tuple(map(swapped, row)) for row in values]
    values += [row for row, old in zip(new, values, strict=True) if any(map(operator.is_not, row, old))]
    return [dict(zip(names, row, strict=True)) for row in values]


def choices(function: Any) -> tuple[Callable[..., None], list[list[dict[str, object]]]]:
    """A test without its loops, and the arguments of these and of its parametrisations."""
    found = [rows(mark) for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    while hasattr(function, "loop"):
        name, values, function = function.loop
        found.append(rows(pytest.mark.parametrize(name, values).mark))
    return function, found


def cases() -> dict[str, list[tuple[Callable[..., None], dict[str, object]]]]:
    """Every test of a family by its name, with every choice of its arguments that has an outsider among them."""
    found: dict[str, list[tuple[Callable[..., None], dict[str, object]]]] = {}
    for module in FAMILIES:
        for name, function in vars(module).items():
            marks = getattr(function, "pytestmark", [])
            if not name.startswith("test_") or any(mark.name == "skipif" and mark.args[0] for mark in marks):
                continue
            inner, arguments = choices(function)
            for chosen in product(*arguments):
                case = {key: value for row in chosen for key, value in row.items()}
                if {"secant", "twice"} & {str(getattr(value, "kind", value)) for value in case.values()}:
                    found.setdefault(name, []).append((inner, case))
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_an_outsider_passes(name: str) -> None:
    failures = []
    for function, arguments in CASES[name]:
        try:
            function(**arguments)
        except Exception as failure:
            failures.append(f"{arguments}: {type(failure).__name__}: {failure}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("test", ["test_samplers_are_linear_on_gaussian_data",
                                  "test_a_sample_does_not_depend_on_its_place_in_a_batch"])
@pytest.mark.parametrize("sampler", [*test_samplers.SAMPLERS, Twice])
def test_what_hypothesis_draws_schedules_for_holds_on_a_new_one(test: str, sampler: type[Sampler]) -> None:
    inner = choices(getattr(test_properties, test))[0].hypothesis.inner_test  # type: ignore[attr-defined]
    wanted = {"schedule": Secant(), "a": 0.7, "b": -2.0, "x": 1.5, "y": -0.4, "order": [3, 0, 4, 1, 2], "cut": 2}
    if sampler().order or "cut" in inspect.signature(inner).parameters:
        inner(sampler=sampler(), **{key: wanted[key] for key in inspect.signature(inner).parameters if key in wanted})


def test_the_families_are_all_there() -> None:
    """The list above is made by looking; these must not fall out of it."""
    ran = {(name, value.kind) for name, found in CASES.items() for _, arguments in found  # type: ignore[attr-defined]
           for value in arguments.values() if getattr(value, "kind", None) in ("secant", "twice")}
    schedules = ["the_clean_end", "logsnr_falls_and_is_that_of_the_level", "rates_are_the_derivatives",
                 "time_inverts_logsnr", "logsnr_falls_between_any_two_times", "both_ends_come_back",
                 "every_prediction_is_converted_to_every_other", "every_grid_falls_to_zero_on_every_schedule",
                 "weights_are_finite_and_not_negative_everywhere", "drawn_times_can_be_trained_at",
                 "a_gaussian_has_its_own_density", "no_guidance_and_no_denoiser_waits"]
    samplers = ["a_sample_does_not_depend_on_its_batch", "one_step_and_two_reach_a_finite_sample",
                "watching_changes_nothing_and_shows_every_step", "samplers_are_linear_on_gaussian_data",
                "the_network_is_called_as_often_as_declared_and_where_it_may_be", "no_sampler_waits",
                "away_from_the_ends_a_step_costs_what_is_declared", "nothing_grows_with_the_steps",
                "a_sample_does_not_depend_on_its_place_in_a_batch", "samplers_are_frozen_configs"]
    both = ["order_of_convergence", "the_data_come_out_on_every_process_and_prediction",
            "a_sampler_that_rises_comes_back_and_any_other_refuses"]
    assert ran >= {(f"test_{name}", "secant") for name in schedules + both}
    assert ran >= {(f"test_{name}", "twice") for name in samplers + both}


def test_outsiders_train_and_draw_as_objects() -> None:
    """A loss to descend and a guided batch of samples, through the Python API alone."""
    diffusion, noise = Diffusion(schedule=Secant(), prediction=V()), Noise.from_seeds([0, 1])
    weight = torch.tensor(0.5, requires_grad=True)
    told, untold = (Cond(torch.full((2, 1, 1), flag), torch.ones(2, 1, dtype=torch.bool)) for flag in (1.0, 0.0))

    def network(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        return weight * torch.tanh(x + cond.context[:, 0])

    loss = Denoising(diffusion=diffusion, times=LogitNormal(), weighting=ELBO())(network, torch.ones(2, 3), told, noise)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and bool(weight.grad.isfinite()) and weight.grad != 0
    drawn = []
    for scale in (1.0, 3.0):
        denoise = ClassifierFree(scale=scale)(Denoiser(network, diffusion), told, untold)
        x = prior(Secant(), (3,), noise)
        drawn.append(sample(Twice(), denoise, x, Karras()(8, Secant()), noise))
        assert bool(drawn[-1].isfinite().all())
    assert not torch.equal(*drawn)


MODULES = {
    "schedules": """
from ldm.schedules.continuous import _ToNoise
from ldm.schedules import Level
import torch
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Root(_ToNoise):
    kind: str = "root"

    def __call__(self, t):
        return Level((1 - t).sqrt(), t.sqrt())

    def rates(self, t):
        return Level(-0.5 / (1 - t).sqrt(), 0.5 / t.sqrt())

    def time(self, logsnr):
        return torch.sigmoid(-logsnr)

SCHEDULES = (Root,)
""",
    "samplers": """
from dataclasses import dataclass
from ldm.samplers.base import Sampler, mix

@dataclass(frozen=True, kw_only=True)
class Plain(Sampler):
    rises = True
    kind: str = "plain"

    def step(self, denoise, x, t, s, memory, noise):
        return mix(denoise.schedule(s), denoise(x, t)), None

SAMPLERS = (Plain,)
""",
}


@pytest.mark.parametrize("family", MODULES)
def test_one_new_module_is_a_new_member(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found without a line anywhere else, last in the family, and it draws."""
    package, name = importlib.import_module(f"ldm.{family}"), f"ldm.{family}.from_outside"
    (tmp_path / "from_outside.py").write_text(MODULES[family])
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    order = getattr(package, "ORDER", ())
    *known, new = members(f"ldm.{family}", family.upper(), order)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(package, "from_outside")
    assert tuple(known) == getattr(package, family.upper())
    assert [cls.kind for cls in known][: len(order)] == list(order)
    sampler, schedule = (new(), Flow()) if family == "samplers" else (DDIM(), new())
    noise, data = Noise.from_seeds([0, 1]), test_samplers.gaussian(schedule)
    x = prior(schedule, (1,), noise, dtype=torch.float64)
    drawn = sample(sampler, data, x, Karras()(64, schedule), noise)
    torch.testing.assert_close(drawn, 0.5 * x, rtol=0.05, atol=0)
