"""The table of docs/recipes.md: what is proposed for a laptop, one GPU and several, by the proposals."""

from __future__ import annotations

import re

from training.messages import roughly
from training.settings.recipes import SMALL, Proposal, Situation, expected, in_epochs, propose

MACHINES = {"a laptop": ("cpu", 1), "one GPU": ("cuda", 1), "four GPUs": ("cuda", 4)}
PICTURES, SIDES = (60, 500, 10_000, 1_000_000), (64, 128, 256)
HEAD = (
    "| with | pictures | px | pair | stage one: steps x batch | time | stage two: steps x batch | time | memory "
    "| what it will draw |\n" + "| --- " * 10 + "|\n"
)


def table() -> str:
    """A row for each machine, number of pictures and size."""
    return HEAD + "".join(
        _row(machine, Situation(pictures=pictures, resolution=side, device=device, processes=count, unit=count))
        for machine, (device, count) in MACHINES.items()
        for pictures in PICTURES
        for side in SIDES
    )


def renew(text: str) -> str:
    """A page whose table is that of now."""
    return re.sub(re.escape(HEAD) + r"(\|.*\n)*", lambda _: table(), text)


def _row(machine: str, situation: Situation) -> str:
    first, second = propose("autoencoder", situation), propose("denoiser", situation)
    parts = [f"{p.steps:,} x {p.batch} ({in_epochs(p.epochs or 0)}) | {_time(p)}" for p in (first, second)]
    memory = max(first.pair.autoencoder.memory, second.pair.denoiser.memory)
    told = f"{memory:.1f} GB" if memory and not situation.cuda else "not yet measured"
    what = f"{machine} | {situation.pictures:,} | {situation.resolution} | `{first.pair.name}`"
    return f"| {what} | {' | '.join(parts)} | {told} | {expected(second)} |\n"


def _time(proposal: Proposal) -> str:
    """Measured on a core, estimated for GPUs, or no more than a bound."""
    if proposal.seconds is None:
        return "not yet measured"
    return f"{roughly(proposal.seconds)}{' (estimate)' if proposal.pair not in SMALL else ''}"
