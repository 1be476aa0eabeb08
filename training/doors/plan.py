"""Say before a training what it will take: parameters, FLOPs, memory, disk, hours and price.

All other flags are those of the training: of train_autoencoder with --data, of train_denoiser with --latents. A few
steps of it are taken in this process and forgotten; nothing is written but the plan.
"""

from __future__ import annotations

import argparse
import sys

from training.doors.train_autoencoder import stage_one
from training.doors.train_denoiser import stage_two
from training.errors import USAGE, UserError
from training.settings.flags import TrainParser, check_least

OF_TRAINING = ("resume", "allow-batch-change", "report-to")


def main() -> None:
    """Read the flags and plan."""
    given = {word.partition("=")[0] for word in sys.argv[1:]}
    if {"--data", "--latents"} <= given:
        hint = "give --data DIR to plan stage one, --latents DIR for stage two"
        raise UserError("--data and --latents: a plan is of one stage", hint=hint, code=USAGE)
    parser = (stage_one if "--data" in given else stage_two)(__doc__ or "")
    if "--data" not in given:
        text = "packed images: plans stage one, whose own flags are told by --data DIR --help"
        parser.data.add_argument("--data", metavar="DIR", help=text)
    add_flags(parser)
    args = parser.read_training()
    check(args)
    from training.planning.plan import plan

    sys.exit(plan(args, parser.stage))


def add_flags(parser: TrainParser) -> None:
    """Those of a plan; a training's flags that are not of one are no longer listed."""
    parser.conflict_handler = "resolve"
    group = parser.add_argument_group("plan")
    for flag in OF_TRAINING:
        group.add_argument(f"--{flag}", nargs="?", const=True, help=argparse.SUPPRESS)
    add = group.add_argument
    add("--dry-run", action="store_true", default=True, help=argparse.SUPPRESS)
    add("--output", metavar="FILE.json", help="write the plan there, too")
    add("--overwrite", action="store_true", help="replace a file that is there")
    text = "steps that are timed, the first few for nothing; 0: none, nor is memory measured at the full micro-batch"
    add("--trial-steps", metavar="N", type=int, default=20, help=text)
    text = "of the run to come, each as this one; when not given, the launcher's WORLD_SIZE, or 1"
    add("--processes", metavar="N", type=int, default=0, help=text)
    add("--memory", metavar="GIB", type=float, help="what a process may have; when not given, what the device has")
    add("--price-per-hour", metavar="X", type=float, help="of one process, in any currency")


def check(args: argparse.Namespace) -> None:
    """Refuse what a plan does not have; the training's flags as one without a run folder. Raises UserError."""
    if of_training := [f"--{flag}" for flag in OF_TRAINING if getattr(args, flag.replace("-", "_")) is not None]:
        what = f"{', '.join(of_training)}: a plan is of a whole run, and begins none"
        raise UserError(what, hint="leave it out", code=USAGE)
    check_least(args, {"trial_steps": 0, "processes": 0})
    for name in ("memory", "price_per_hour"):
        if (number := getattr(args, name)) is not None and not 0 < number < float("inf"):
            raise UserError(f"--{name.replace('_', '-')}: must be above 0 (got {number:g})")
    if args.output and not args.output.endswith(".json"):
        raise UserError(f"--output {args.output}: is the plan's file here", hint="give --output FILE.json", code=USAGE)
    args.allow_batch_change, args.report_to = False, "none"
