"""Every speed that is aimed at, measured beside unmodified peers in this run, and whether it is met.

Sides take turns, in alternating order, and only after all of them gave the same; a number is the median of the rounds'
quotients. "As launched against as installed" is ours with its allocator against the peer in a process that never heard
of it. A matrix product timed in the same rounds says how fast the machine was just then. Needs the package diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import UserError
from training.files import write_json, write_text
from training.guarding import check_free
from training.messages import answer, tell, warn

if TYPE_CHECKING:
    from training.benchmarks.case import Case, Lane, Place
    from training.settings.flags import Parser

SLACK = 0.8  # of a target, below which --check fails
Open = Callable[["Case", Sequence["Lane"], "Place"], Any]


def flags(parser: Parser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--cases", metavar="NAME,...", default="all", help="which comparisons, by name")
    add("--smoke", action="store_true", help="small networks and few rounds: two minutes on two quiet cores")
    add("--gpu", action="store_true", help="bfloat16 on a CUDA device, eager and compiled: planned for ten minutes")
    add("--rounds", metavar="N", type=int, default=0, help="of all sides in turn; 0: 7, with --gpu 5, with --smoke 3")
    add("--threads", metavar="N", type=int, default=0, help="processor threads; 0: torch's own choice")
    add("--busy", action="store_true", help="on a machine with other work: one thread, and its processor time")
    add("--json", metavar="FILE", help="write all that was measured there")
    add("--renew", metavar="FILE", type=Path, help="renew the tables of this page, docs/benchmarks.md")
    add("--overwrite", action="store_true", help="replace the file of --json where it is there")
    text = "exit with 1 where a speed-up or a cost misses its target by a fifth, and does so again when measured anew"
    add("--check", action="store_true", help=text)
    parser.machine(device="")


def run(args: Any) -> None:
    """Measure, print the table, write what was asked for. Exit code 1 where `--check` found something."""
    from training.benchmarks import results
    from training.benchmarks.cases import CASES
    from training.measuring.conformance import select

    if min(args.rounds, args.threads) < 0:
        raise UserError("--rounds and --threads must be at least 0")
    check_free(args.json, args.overwrite)
    if args.renew and not args.renew.is_file():
        raise UserError(f"{args.renew}: no such page", hint="name docs/benchmarks.md of a checkout")
    place = place_of(args)
    chosen = list(select({case.kind: case for case in CASES}, args.cases, "--cases").values())
    about = results.environment(place, smoke=args.smoke)
    found = measured(chosen, place, args.rounds or (3 if args.smoke else 5 if args.gpu else 7), check=args.check)
    answer(*results.table(chosen, found, place.device), "", *results.below(about, found))
    if args.json:
        write_json(Path(args.json), results.record(about, chosen, found, place.device))
    if args.renew:
        page = args.renew.read_text("utf-8")
        write_text(args.renew, results.renewed(page, CASES, found, about, place.device))
    if missed := results.missed(chosen, found, place.device, SLACK):
        lines = "\n  ".join(missed)
        warn(f"below {SLACK:g} of its target:\n  {lines}")
        if args.check:
            raise SystemExit(1)


def place_of(args: Any) -> Place:
    """Where and how large. Raises UserError where there is no GPU to measure."""
    import torch

    from training.benchmarks.case import Place

    if args.gpu and not torch.cuda.is_available():
        raise UserError("--gpu: no CUDA device here", hint="leave --gpu out: the CPU's numbers are measured then")
    size: Any = "smoke" if args.smoke else "gpu" if args.gpu else "cpu"
    threads = 1 if args.busy else args.threads
    return Place("cuda" if args.gpu else "cpu", size, processor=args.busy, threads=threads)


def measured(cases: Iterable[Case], place: Place, rounds: int, *, check: bool,
             crew: Open | None = None) -> dict[str, Any]:  # fmt: skip
    """By case, its lanes' rounds and facts. With `check`, a case below its targets is measured once more, and the
    better of both counts: other work on the machine may have fallen on one side alone."""
    from training.benchmarks import lanes, results

    found: dict[str, Any] = {}
    for case in cases:
        tell(f"measuring {case.kind}: {case.title}")
        found[case.kind] = one(case, place, rounds, crew or lanes.Crew)
        if check and (missed := results.missed([case], found, place.device, SLACK)):
            tell(f"measuring it again: {'; '.join(missed)}")
            again = {case.kind: one(case, place, rounds, crew or lanes.Crew)}
            if len(results.missed([case], again, place.device, SLACK)) < len(missed):
                found |= again
    return found


def one(case: Case, place: Place, rounds: int, crew: Open) -> dict[str, Any]:
    """The lanes of a case, in turn and in alternating order."""
    from training.benchmarks.lanes import at_peak

    own, _ = case.at(place.device)
    times: dict[str, list[float]] = {lane.name: [] for lane in own}
    with crew(case, own, place) as team:
        for number in range(min(rounds, case.rounds or rounds)):
            for lane in own[:: -1 if number % 2 else 1]:
                times[lane.name].append(team.turn(lane))
        facts = team.facts()
        told = dict(team.told)
    if place.device == "cuda" and told["flops"]:
        times["989 TFLOP/s"] = [at_peak(told["flops"])] * len(times[own[0].name])
    return {**told, "lanes": times, "facts": facts}
