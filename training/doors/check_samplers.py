"""Check every sampler against an exact answer, on every process, prediction and grid; or on a trained run.

Without --model: data N(0.3, 0.5^2), for which the perfect network is known. A sampler is then an affine map of its
start and its noise, so one run gives mean and variance of its result exactly, and how far it carries a sample from
where the ODE does; that also on a mixture of two Gaussians in the plane. Prints Markdown tables of network calls,
errors and fitted orders of convergence, and the combinations that are refused, with reasons. With --model: all samplers
draw from the run's own network with many steps. Those without noise of their own must agree on the pictures, the others
on their distribution: the command ends with code 5 where one does not.
"""

from __future__ import annotations

from training.settings.flags import Parser, check_least


def main() -> None:
    """Read the flags and print the tables."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--samplers", metavar="NAME,...", default="all", help="which samplers, by name")
    text = "which schedules, by name; TABLE-zero-snr is a DDPM table rescaled to end in pure noise"
    add("--processes", metavar="NAME,...", default="all", help=text)
    add("--grids", metavar="NAME,...", default="karras", help="which grids, by name, or all")
    add("--steps", metavar="N", type=int, help="steps of each run (32; with --model 200)")
    add("--model", metavar="RUN", help="check the samplers on this denoiser's run, or demo, instead")
    add("--text-encoder", metavar="NAME|DIR", help="where a large frozen text encoder lies on this machine")
    add("--prompt", metavar="TEXT", default="", help="with --model: the caption to draw")
    add("--seeds", metavar="N", type=int, default=32, help="with --model: pictures that a distribution is judged by")
    add("--output", metavar="FILE", help="write the table there too")
    add("--overwrite", action="store_true", help="replace that file where it is there")
    parser.machine(device="")
    args = parser.read()
    if args.steps is None:
        args.steps = 200 if args.model else 32
    check_least(args, {"steps": 1})
    check_least(args, {"seeds": 16}, hint="fewer say nothing about a distribution")
    from training.measuring.conformance import check

    check(args)
