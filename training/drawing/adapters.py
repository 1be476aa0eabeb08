"""Adapters of a drawing: `--adapter RUN[:WEIGHT]`, and what a picture says of them. Free of torch at import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import CHECKPOINT, UserError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from training.models.adapters import Chosen

FACT = "adapters"  # names and weights; their hashes stand among those of the model


def add_flags(add: Callable[..., Any]) -> None:
    """Add `--adapter`."""
    text = "what was learned upon the model (train_denoiser --base), with a weight if not 1; repeatable"
    add("--adapter", metavar="RUN[:WEIGHT]", action="append", default=[], help=text)


def chosen(args: argparse.Namespace) -> list[Chosen]:
    """The adapters that the flags ask for."""
    from training.models.adapters import parse_chosen

    return [parse_chosen("--adapter", text) for text in args.adapter]


def facts(args: argparse.Namespace) -> list[list[Any]] | None:
    """Name and weight of each; None where there is none."""
    from training.models.folders import name_of

    return [[name_of(run), weight] for run, weight in chosen(args)] or None


def recall(args: argparse.Namespace, path: Path, told: Any) -> None:
    """Lay the weights that a picture tells over the adapters that are given. Raises UserError (code 4) where it was
    drawn with more or fewer."""
    if len(args.adapter) != len(told or []):
        names = ", ".join(name for name, _ in told or []) or "none"
        what = f"{path} was drawn with {len(told or [])} adapters ({names}), {len(args.adapter)} are given"
        raise UserError(what, hint="give the same ones in the same order with --adapter", code=CHECKPOINT)
    args.adapter = reweighed("--adapter", args.adapter, [weight for _, weight in told or []])


def reweighed(flag: str, given: list[str], weights: list[float]) -> list[str]:
    """The runs that a flag gives, with the weights that a picture tells. Raises UserError where the flag says another.
    """
    from training.models.adapters import parse_chosen

    words = list[str]()
    for text, weight in zip(given, weights, strict=True):
        run, own = parse_chosen(flag, text)
        if text != run and own != weight:
            what = f"--like takes the weight from its picture, which says {weight}: {flag} {text} says {own}"
            raise UserError(what, hint=f"leave the weight out: {flag} {run}")
        words.append(f"{run}:{weight}")
    return words


def sound(told: Any) -> bool:
    """Whether the facts in a picture are of the kinds that `facts` gives."""
    return isinstance(told, list) and all(
        isinstance(pair, list) and [type(part) for part in pair] in ([str, float], [str, int]) for pair in told)
