"""What fills a hole in place of the sampler: a posterior sampler of `--method`, on the latents that are seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.errors import UserError
from training.settings import decoding
from training.settings.families import all_kinds

if TYPE_CHECKING:
    import argparse

    from ldm.inverse.posterior import Posterior


def posterior_of(args: argparse.Namespace) -> Posterior | None:
    """That of `--method` and `--posterior.KEY`, or what `--like` read; None without `--method`. Raises UserError for a
    method that is no posterior sampler, and for a part of the walk."""
    if not args.method:
        return None
    told = isinstance(args.method, dict)
    if not told and args.method in all_kinds("measurement"):
        hint = f"take one of {', '.join(all_kinds('posterior'))}, or leave --method out"
        raise UserError(f"--method {args.method} is for --restore", hint=hint)
    posterior: Posterior = (decoding.recalled("posterior", args.method) if told
                            else decoding.chosen("posterior", {"posterior.kind": args.method, **args.overrides}))
    if args.strength not in (None, 1) or args.start_time is not None:
        raise UserError(f"--method {posterior.kind} walks from noise alone, more than once", hint="leave --strength "
                        "and --start-time out")
    return posterior
