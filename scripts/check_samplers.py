"""Check every sampler against an exact answer, on every process, prediction and grid; or on a trained run.

Without --model: data N(0.3, 0.5^2), for which the perfect network is known. A sampler is then an affine map of its
start and its noise, so one run gives mean and variance of its result exactly. Prints a Markdown table of
network calls, bias of mean and variance, fitted order of convergence, and the combinations that are refused, with
reasons. With --model: all samplers draw from the run's own network with many steps, and those without noise of their
own must agree: the command ends with code 5 where one does not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from training.cli import Parser, run_main
from training.errors import UserError

MEAN, STD = 0.3, 0.5
AGREEMENT = 0.05  # of the latents' standard deviation, root mean square


def main() -> None:
    parser = Parser(__doc__ or "")
    parser.add_argument("--samplers", metavar="NAME,...", default="all", help="which samplers, by name")
    parser.add_argument("--processes", metavar="NAME,...", default="all", help="which schedules, by name")
    parser.add_argument("--grids", metavar="NAME,...", default="karras", help="which grids, by name, or all")
    parser.add_argument("--steps", metavar="N", type=int, help="steps of each run (32; with --model 200)")
    parser.add_argument("--model", metavar="RUN", help="check the samplers on this denoiser's run instead")
    parser.add_argument("--prompt", metavar="TEXT", default="", help="with --model: the caption to draw")
    parser.add_argument("--output", metavar="FILE", help="write the table there too")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.read()
    if args.steps is None:
        args.steps = 200 if args.model else 32
    if args.steps < 1:
        raise UserError(f"--steps must be at least 1, got {args.steps}")
    lines: list[str] = []
    title = "# Samplers against each other\n" if args.model else "# Samplers against the exact answer\n"
    for line in chain((title, *command()), run_table(args) if args.model else oracle_table(args)):
        print(line, flush=True)
        lines.append(line)
    if args.output:
        Path(args.output).write_text("\n".join(lines) + "\n")
    if strays := [line.split("|")[1].strip() for line in lines if line.endswith("| no |")]:
        raise UserError(f"{', '.join(strays)}: further than {AGREEMENT:.0%} from rk4 after {args.steps} steps",
                        hint="ask for more --steps; a sampler that stays away is wrong for this model", code=5)


def command() -> tuple[str, ...]:
    """How this table was made."""
    import shlex

    return "```bash", f"python scripts/check_samplers.py {shlex.join(sys.argv[1:])}".rstrip(), "```\n"


def chosen(members: tuple[type, ...], names: str, flag: str) -> list[Any]:
    """The members called `names`, all for "all", built with their defaults. Raises UserError on an unknown name."""
    kinds = {member.kind: member for member in members}  # type: ignore[attr-defined]
    unknown = [name for name in names.split(",") if name != "all" and name not in kinds]
    if unknown:
        raise UserError(f"{flag}: unknown name {unknown[0]!r}", hint=f"choose from {', '.join(kinds)} or all")
    return [kinds[name]() for name in (kinds if names == "all" else names.split(","))]


def oracle_table(args: Any) -> Iterator[str]:
    """The conformance table on the exact Gaussian."""
    from ldm.diffusion import Diffusion
    from ldm.grids import GRIDS
    from ldm.predictions import PREDICTIONS
    from ldm.samplers import SAMPLERS
    from ldm.schedules import SCHEDULES

    processes = chosen(SCHEDULES, args.processes, "--processes")
    samplers, grids = chosen(SAMPLERS, args.samplers, "--samplers"), chosen(GRIDS, args.grids, "--grids")
    yield f"Data N({MEAN}, {STD}^2), {args.steps} steps. Order: of the variance's error from log-SNR -4.6 to 4.6. "
    yield "Between predictions: the largest difference their coefficients make to a result (float64). "
    yield "Order -: its bias is not set by the step; measured on 2^17 numbers, which alone vary by 0.4 % in variance.\n"
    yield "| sampler | process | grid | calls | mean - exact | variance / exact - 1 | order | between predictions |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"
    refused: dict[str, str] = {}
    for schedule in processes:
        allowed = []
        for prediction in (cls() for cls in PREDICTIONS):
            try:
                allowed.append(Diffusion(schedule=schedule, prediction=prediction))
            except ValueError as error:
                refused[f"{schedule.kind} x {prediction.kind}"] = str(error)
        for sampler in samplers:
            order = fitted(sampler, schedule)
            for grid in grids:
                try:
                    times = grid(args.steps, schedule)
                except ValueError as error:
                    refused[f"{schedule.kind} x {grid.kind}"] = str(error)
                    continue
                calls, mean, variance, spread = measured(sampler, schedule, times, allowed)
                yield (
                    f"| {sampler.kind} | {schedule.kind} | {grid.kind} | {calls} | {mean - MEAN:+.1e} | "
                    f"{variance / STD**2 - 1:+.1e} | {order} | {spread:.0e} |"
                )
    yield "\nRefused when built:\n"
    for pair, reason in refused.items():
        yield f"- {pair}: {reason}"


def measured(sampler: Any, schedule: Any, times: Any, allowed: list[Any]) -> tuple[int, float, float, float]:
    """Network calls, mean and variance of the result, and the largest difference between predictions."""
    import torch

    from ldm.noise import Noise
    from ldm.samplers import prior, sample

    oracles = bench()
    oracle = oracles.Isotropic(schedule, STD, MEAN)
    counted = oracles.Counted(oracle)
    noise = Noise.from_seeds([0])
    x = prior(schedule, (4,), noise, dtype=torch.float64)
    drawn = sample(sampler, counted, x, times, noise)
    others = [sample(sampler, oracles.Through(oracle, diffusion), x, times, noise) for diffusion in allowed]
    mean, variance = moments(sampler, schedule, times)
    return len(counted.times), mean, variance, max((other - drawn).abs().max().item() for other in others)


def moments(sampler: Any, schedule: Any, times: Any) -> tuple[float, float]:
    """Mean and variance of the result from the exact marginal at times[0]: exact, or by 2^17 numbers where the sampler
    is no affine map (order 0)."""
    import torch

    from ldm.noise import Noise
    from ldm.samplers import sample

    oracles = bench()
    oracle, (alpha, sigma) = oracles.Isotropic(schedule, STD, MEAN), schedule(times[0])
    start = ((alpha * STD) ** 2 + sigma**2).sqrt()
    if sampler.order == 0:
        noise = Noise.from_seeds(list(range(32)))
        x = alpha * MEAN + start * noise.normal((4096,), "start", dtype=torch.float64)
        drawn = sample(sampler, oracle, x, times, noise)
        return drawn.mean().item(), drawn.var().item()
    batch = 3 + len(times) * sampler.calls
    x = (alpha * MEAN).expand(batch, 1).clone()
    # Sample 0 has neither noise nor a start of its own; the last has the start alone, and the rest a draw each.
    x[-1] += start
    drawn = sample(sampler, oracle, x, times, oracles.Impulses(batch))
    return drawn[0].item(), (drawn - drawn[0]).square().sum().item()


def fitted(sampler: Any, schedule: Any) -> str:
    """The order of convergence, over an interval without the ends of time."""
    import torch

    oracles = bench()
    if sampler.order == 0:
        return "-"
    counts, errors = ([16, 32, 64] if sampler.order > 3 else [32, 64, 128]), []
    for steps in counts:
        times = schedule.time(torch.linspace(-4.6, 4.6, steps + 1, dtype=torch.float64))
        alpha, sigma = schedule(times[-1])
        errors.append(abs(moments(sampler, schedule, times)[1] - ((alpha * STD) ** 2 + sigma**2).item()))
    return f"{oracles.fitted_order(counts, errors):.2f}"


def run_table(args: Any) -> Iterator[str]:
    """How far each sampler's latents are from those of the classic Runge-Kutta rule, on a trained network."""
    import torch

    from ldm.grids import Uniform
    from ldm.guidance import ClassifierFree
    from ldm.noise import Noise
    from ldm.pipeline import Sampling
    from ldm.samplers import RK4, SAMPLERS
    from training.system import load_pipeline

    pipeline = load_pipeline(args.model)
    noise = Noise.from_seeds([0, 1], pipeline.device)
    shape = pipeline.latent_shape(pipeline.size)

    def draw(sampler: Any, source: Noise = noise) -> torch.Tensor:
        plan = Sampling(sampler=sampler, grid=Uniform(), guidance=ClassifierFree(scale=1.0), steps=args.steps)
        with torch.no_grad():
            return pipeline.latents(pipeline.guided([args.prompt] * 2, plan=plan), source, shape, plan)

    exact = draw(RK4())
    yield f"Latents of 2 seeds after {args.steps} uniform steps, against rk4 (standard deviation {exact.std():.3f}).\n"
    yield "| sampler | root mean square difference | standard deviation | agrees |"
    yield "|---|---:|---:|---|"
    for sampler in chosen(SAMPLERS, args.samplers, "--samplers"):
        drawn = draw(sampler)
        apart = (drawn - exact).square().mean().sqrt()
        agrees = ("yes" if apart <= AGREEMENT * exact.std() else "no") if sampler.rises else "stochastic"
        yield f"| {sampler.kind} | {apart:.4f} | {drawn.std():.3f} | {agrees} |"
    yield "\nStochastic samplers draw other pictures of the same distribution: compare their standard deviation alone."


def bench(module: str = "oracles") -> Any:
    """A judge that lives with the tests of this checkout. Raises UserError where there is none."""
    import importlib

    folder = Path(__file__).resolve().parent.parent / "tests" / "ldm"
    if not (folder / f"{module}.py").is_file():
        raise UserError(f"the {module} are not at {folder}", hint="run this from a checkout of the repository")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(module)


if __name__ == "__main__":
    run_main(main)
