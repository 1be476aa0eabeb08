"""Samplers checked against exact answers, on every process, prediction and grid; or all samplers on a trained run.

On data N(m, s^2) a sampler is an affine map of its start and its noise, so impulses give mean and variance of its
result exactly, and the distance from where the ODE ends; a mixture of two Gaussians in the plane shows the same where
the ODE is not linear. On a trained run there is no exact answer: there the samplers judge each other.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from numpy.polynomial.hermite_e import hermegauss

from ldm.diffusion import Diffusion
from ldm.exact import (
    Beside,
    Counted,
    Impulses,
    Isotropic,
    draws_of,
    end_of_ode,
    fitted_order,
    scalar,
    two_modes,
)
from ldm.grids import Given
from ldm.noise import Noise
from ldm.samplers import prior, sample
from ldm.schedules import Table
from ldm.students import check_denoises
from training.commands import opener
from training.errors import UserError, as_user_error
from training.files import write_text
from training.guarding import check_free
from training.measuring.sampler_agreement import Bench, table
from training.messages import answer
from training.models.assembly import load_pipeline
from training.settings.decoding import sections

MEAN, STD = 0.3, 0.5
SAMPLES = 64  # of the mixture


def check(args: Any) -> None:
    """Print the tables, write them, and raise UserError (code 5) where a sampler strays."""
    check_free(args.output, args.overwrite)
    since, lines = (time.perf_counter(), time.process_time()), list[str]()
    title = "# Samplers against each other\n" if args.model else "# Samplers against the exact answer\n"
    for line in chain((title, *command()), run_table(args) if args.model else oracle_tables(args)):
        answer(*line.split("\n"))
        lines.append(line)
    took = f"Took {time.perf_counter() - since[0]:.0f} s, {time.process_time() - since[1]:.0f} s of processor time."
    answer("", took)
    if args.output:
        write_text(Path(args.output), "\n".join([*lines[:4], f"{took}\n", *lines[4:]]) + "\n")
    if strays := [line.split("|")[1].strip() for line in lines if line.endswith("| no |")]:
        raise UserError(f"{', '.join(strays)}: further away than allowed after {args.steps} steps",
                        hint="ask for more --steps; a sampler that still differs does not suit this model", code=5)


def command() -> tuple[str, ...]:
    """How this table is made."""
    return "```bash", shlex.join([*opener("check_samplers", "python"), *sys.argv[1:]]), "```\n"


def select(members: dict[str, Any], names: str, flag: str) -> dict[str, Any]:
    """The members of these names, all for "all". Raises UserError on an unknown name."""
    wanted = list(members) if names == "all" else names.split(",")
    if unknown := [name for name in wanted if name not in members]:
        raise UserError(f"{flag}: unknown name {unknown[0]!r}", hint=f"choose from {', '.join(members)} or all")
    return {name: members[name] for name in wanted}


def denoising(names: str) -> dict[str, Any]:
    """The samplers of these names, for "all" those of denoisers. Raises UserError for one of few-step models."""
    samplers = select(every("sampler"), names, "--samplers")
    few_step = [kind for kind, sampler in samplers.items() if sampler.jumps]
    if few_step and names != "all":
        what = f"--samplers: {few_step[0]} takes the steps of a few-step model, and what is exact here is a denoiser"
        raise UserError(what, hint="leave it out: it is compared on a few-step model alone")
    return {kind: sampler for kind, sampler in samplers.items() if not sampler.jumps}


def left_out() -> str:
    """Which samplers are not among those of denoisers, in a sentence."""
    few_step = [kind for kind, sampler in every("sampler").items() if sampler.jumps]
    return f"Left out: {', '.join(few_step)},\nwhich take the steps of few-step models."


def every(section: str) -> dict[str, Any]:
    """The members of a family by their kind, built with their defaults."""
    return {str(member.kind): member() for member in family(section)}


def family(section: str) -> tuple[Any, ...]:
    """The kinds that a section of a denoiser's config may hold."""
    return sections("denoiser")[section]


def processes() -> dict[str, Any]:
    """Every schedule by name, and the DDPM tables with their last entry rescaled to pure noise."""
    tables = [member for member in family("schedule") if issubclass(member, Table)]
    return every("schedule") | {f"{member.kind}-zero-snr": member(zero_terminal_snr=True) for member in tables}


def oracle_tables(args: Any) -> Iterator[str]:
    """Errors of every combination, orders of convergence, and what is refused."""
    schedules = select(processes(), args.processes, "--processes")
    samplers = denoising(args.samplers)
    given_grid = Given(times=tuple(torch.linspace(1, 0, args.steps + 1, dtype=torch.float64).tolist()))
    grids = select(every("grid") | {Given.kind: given_grid}, args.grids, "--grids")
    reasons: dict[str, str] = {}
    yield f"""Data N({MEAN}, {STD}^2), {args.steps} steps. Bias of the result's mean and variance: exact, but for
predictor-corrector, whose steps look at the sample: measured on 2^15 numbers, which alone vary by 0.8 % in variance.
End error: how far a sampler without noise of its own carries a sample from where the ODE does, root mean square over
the data's standard deviation; two modes: the same on {SAMPLES} samples of a mixture in the plane, against RK4 in 200
steps. Predictions: the largest difference their coefficients make to a result (float64). The grid `given` is a list of
equal steps of t. {left_out()}
"""
    columns = "process | grid | calls | mean - exact | variance / exact - 1 | end error | two modes | predictions"
    yield f"| sampler | {columns} |"
    yield "|---|---|---|---:|---:|---:|---:|---:|---:|"
    for name, schedule in schedules.items():
        yield from rows(name, schedule, samplers, grids, args.steps, reasons)
    yield from orders(schedules, samplers)
    yield "\n## Refused when built\n"
    for pair, reason in reasons.items():
        yield f"- {pair}: {reason}"


def rows(name: str, schedule: Any, samplers: dict[str, Any], grids: dict[str, Any], steps: int,
         reasons: dict[str, str]) -> Iterator[str]:
    """The rows of one process; what it does not combine with is added to `reasons`."""
    processes_here, times = [], {}
    for kind, prediction in every("prediction").items():
        try:
            processes_here.append(Diffusion(schedule=schedule, prediction=prediction))
        except ValueError as error:
            reasons[f"{name} x {kind}"] = str(error)
    for kind, grid in grids.items():
        try:
            times[kind] = grid(steps, schedule)
        except ValueError as error:
            reasons[f"{name} x {kind}"] = str(error)
    for sampler in samplers.values():
        for grid, visited in times.items():
            calls, spread = through(sampler, schedule, visited, processes_here)
            mean, variance, end = moments(sampler, schedule, visited)
            ends = f"{end / STD:.1e} | {on_two_modes(sampler, schedule, visited):.1e}" if sampler.rises else "- | -"
            bias = f"{mean - MEAN:+.1e} | {variance / STD**2 - 1:+.1e}"
            yield f"| {sampler.kind} | {name} | {grid} | {calls} | {bias} | {ends} | {spread:.0e} |"


def through(sampler: Any, schedule: Any, times: Any, allowed: list[Any]) -> tuple[int, float]:
    """Network calls, and the largest difference between a result through a prediction and without one."""
    noise = Noise.from_seeds([0] * (1 + len(allowed)))
    counted = Counted(Beside(Isotropic(schedule, STD, MEAN), allowed))
    drawn = sample(sampler, counted, prior(schedule, (4,), noise, dtype=torch.float64), times, noise)
    return len(counted.times), (drawn[1:] - drawn[0]).abs().max().item()


def moments(sampler: Any, schedule: Any, times: Any) -> tuple[float, float, float]:
    """Mean and variance of the result from the exact marginal at times[0], and the root mean square of its difference
    to the ODE's."""
    oracle, (alpha, sigma) = Isotropic(schedule, STD, MEAN), schedule(times[0])
    start = ((alpha * STD) ** 2 + sigma**2).sqrt()
    draws = 0 if sampler.rises and sampler.order else draws_of(sampler, oracle, times)
    if draws is None:
        return sampled_moments(sampler, oracle, times, alpha * MEAN, start)
    x = (alpha * MEAN).expand(draws + 2, 1).clone()
    # Sample 0 has neither noise nor a start of its own; the last has the start alone, and the rest a draw each.
    x[-1] += start
    drawn = sample(sampler, oracle, x, times, Impulses(draws + 2))
    parts = drawn - drawn[0]
    end = torch.hypot(drawn[0] - MEAN, parts[-1] - STD)
    return drawn[0].item(), parts.square().sum().item(), end.item()


def sampled_moments(sampler: Any, oracle: Any, times: Any, mean: Any, std: Any) -> tuple[float, float, float]:
    """`moments` of a sampler whose steps look at the sample: over 2^15 numbers, or Gauss-Hermite nodes for one without
    noise."""
    noise = Noise.from_seeds(list(range(32)))
    z = noise.normal((1024,), "start", dtype=torch.float64)
    weights = torch.full_like(z, 1 / z.numel())
    if sampler.rises:
        z, weights = (torch.from_numpy(part[:, None]) for part in hermegauss(32))
        weights = weights / weights.sum()
    drawn = sample(sampler, oracle, mean + std * z, times, noise)
    middle, end = (weights * drawn).sum(), (weights * (drawn - MEAN - STD * z).square()).sum().sqrt()
    return middle.item(), (weights * (drawn - middle).square()).sum().item(), end.item()


def on_two_modes(sampler: Any, schedule: Any, times: Any) -> float:
    """The root mean square of the distance to where the ODE ends on the mixture, over its standard deviation."""
    x, exact, std = mixture(schedule, times[0].item())
    drawn = sample(sampler, two_modes(schedule), x, times, Noise.from_seeds(list(range(SAMPLES))))
    return float((drawn - exact).square().mean().sqrt()) / std


@lru_cache(maxsize=64)
def mixture(schedule: Any, t: float) -> tuple[Any, Any, float]:
    """Samples of the mixture noised to t, where the ODE takes them, and its standard deviation."""
    noise = Noise.from_seeds(list(range(SAMPLES)))
    time = scalar(t)
    alpha, sigma = schedule(time)
    x0 = two_modes(schedule).samples(noise)
    x = alpha * x0 + sigma * noise.normal((2,), "eps", dtype=torch.float64)
    return x, end_of_ode(two_modes, schedule, x, time), x0.std().item()


def orders(schedules: dict[str, Any], samplers: dict[str, Any]) -> Iterator[str]:
    """The order of each solver, a property of its own that no grid with ends has a part in."""
    yield "\n## Orders of convergence\n"
    yield """The slope of the variance's error on grids even in log-SNR from -4.6 to 4.6, in 32 to 128 steps (16 to 64
above order 3): the solver's own, on a stretch of the process without its ends, whatever the grid of the rows above;
least and most over the processes. -: its bias is not set by the step.
"""
    yield "| sampler | declared | least | most |"
    yield "|---|---:|---:|---:|"
    for sampler in samplers.values():
        found = [convergence_order(sampler, schedule) for schedule in schedules.values()] if sampler.order else []
        ends = f"{sampler.order} | {min(found):.2f} | {max(found):.2f}" if found else "- | - | -"
        yield f"| {sampler.kind} | {ends} |"


def convergence_order(sampler: Any, schedule: Any) -> float:
    """The order of convergence, over an interval without the ends of time."""
    counts, errors = ([16, 32, 64] if sampler.order > 3 else [32, 64, 128]), []
    for steps in counts:
        times = schedule.time(torch.linspace(-4.6, 4.6, steps + 1, dtype=torch.float64))
        alpha, sigma = schedule(times[-1])
        errors.append(abs(moments(sampler, schedule, times)[1] - ((alpha * STD) ** 2 + sigma**2).item()))
    return float(fitted_order(counts, errors))


def run_table(args: Any) -> Iterator[str]:
    """How the samplers agree on a trained network."""
    pipeline = load_pipeline(args.model, text_encoder=args.text_encoder)
    with as_user_error("check the model that taught it: --model TEACHER"):
        check_denoises(pipeline.denoiser, "a comparison of samplers")
    bench = Bench(pipeline, args.prompt, args.steps, args.seeds)
    samplers, others = list[Any](), list[str]()
    for kind, sampler in select(every("sampler"), args.samplers, "--samplers").items():
        try:
            bench.check(sampler)
            samplers.append(sampler)
        except ValueError as reason:
            if args.samplers != "all":
                raise UserError(f"--samplers: {reason}", hint="leave it out of --samplers") from None
            others.append(kind)
    if others:
        yield f"Left out: {', '.join(others)}, which are not of this kind of model.\n"
    yield from table(replace(bench, seeds=2) if all(sampler.rises for sampler in samplers) else bench, samplers)
