"""Compare models by quality against network calls and seconds: how many steps are enough.

Draws the same captions with every RUN, sampler and number of steps: a teacher and the students that were taught to take
few steps, or one model alone. Writes a chart, a table and all numbers, and recommends a setting of each run and of all:
the one with the fewest network calls a picture (of these the quickest) whose 95 % interval reaches --good-enough of the
best value measured. That is, of shares obeyed its upper end is at least --good-enough times the best share; of Frechet
distances its lower end is at most the least distance over --good-enough. More pictures make it stricter.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.errors import UserError
from training.measuring.flags import FEATURES
from training.settings.embedded import check_model
from training.settings.flags import Parser, check_keys, check_least


def main() -> None:
    """Read the flags and compare."""
    parser = Parser(__doc__ or "")
    add_flags(parser)
    args = parser.read()
    check(args)
    from training.measuring.step_comparison import compare

    sys.exit(compare(args))


def add_flags(parser: Parser) -> None:
    """All of them."""
    add = parser.add_argument
    text = "a denoiser's run, its final/ or a checkpoint, or demo; as NAME=RUN it is called NAME"
    add("runs", metavar="RUN", nargs="+", help=text)
    text = "numbers of steps, with commas between; when not given, those that a student was taught, else 1,2,4,8,16 and"
    add("--steps", metavar="N,...", help=f"{text} the run's own")
    text = "a kind of sampler that every run is drawn with, the run's own when not given; repeatable"
    add("--sampler", metavar="KIND", action="append", default=[], help=text)
    add("--guidance-scale", metavar="W", type=float, help="1 = no guidance; the run's own when not given")
    group = parser.add_argument_group("what is measured")
    add = group.add_argument
    text = "packed pictures, folder or address; to their val split, else test split, drawn pictures have distances"
    parser.add_data(text)
    add("--features", metavar="NET", default="random", help=FEATURES)
    text = "shapes (the rule-based checker), or with --data the folder of a classifier of captions"
    add("--obedience", metavar="JUDGE", help=text)
    text = "pictures of each setting; of shapes, so many of one, of two and of three objects"
    add("--count", metavar="N", type=int, default=200, help=text)
    add("--seed", type=int, default=0, help="first seed of the pictures")
    text = "the share of the best value, above 0 and up to 1, that is good enough to be recommended"
    add("--good-enough", metavar="SHARE", type=float, default=0.95, help=text)
    group = parser.add_argument_group("results")
    add = group.add_argument
    add("--output", metavar="DIR", required=True, help="where comparison.png, comparison.md and comparison.json go")
    add("--overwrite", action="store_true", help="replace these files where they are there")
    add("--batch-size", metavar="N", type=int, default=100, help="pictures at once, of which seconds are told")
    add("--text-encoder", metavar="NAME|DIR", help="where a large frozen text encoder lies on this machine")
    parser.machine(group)


def check(args: argparse.Namespace) -> None:
    """Refuse what shows to be wrong before torch is loaded, and read lists. Raises UserError."""
    check_least(args, {"count": 1, "batch_size": 1})
    if not 0 < args.good_enough <= 1:
        what = f"--good-enough: must be above 0 and at most 1 (got {args.good_enough:g})"
        raise UserError(what, hint="0.95 asks for 95 % of the best")
    args.steps = numbers(args.steps)
    for kind in args.sampler:
        check_keys({"sampler.kind": kind})
    args.runs = [called(text) for text in args.runs]
    for _, path in args.runs:
        check_model(path)
    if args.obedience not in (None, "shapes") and not args.data:
        what = f"--obedience {args.obedience}: a classifier judges pictures of the captions of packed ones"
        raise UserError(what, hint="give --data DIR besides, or --obedience shapes")
    if not args.data and not args.obedience:
        raise UserError("nothing to measure", hint="give --data DIR or --obedience shapes")


def numbers(text: str | None) -> list[int] | None:
    """`1,2,4` as numbers. Raises UserError for anything else."""
    try:
        steps = [int(word) for word in text.split(",")] if text is not None else None
    except ValueError:
        steps = [0]
    if steps is not None and min(steps) < 1:
        what = f"--steps: expected whole numbers from 1 on with commas between (got {text!r})"
        raise UserError(what, hint="give for instance --steps 1,2,4,8")
    return steps


def called(text: str) -> tuple[str, str]:
    """`NAME=RUN` as both; a folder of such a name, or a path with = further in, is a RUN without one."""
    name, equals, path = text.partition("=")
    named = equals and name and path and "/" not in name and not Path(text).exists()
    return (name, path) if named else ("", text)
