"""Rebuild a denoiser's averaged weights with another length, from the snapshots its training kept.

The training must have kept them: --train.ema_lengths 0.05,0.1 --train.ema_every 1000.
"""

from __future__ import annotations

import sys

from training.settings.flags import Parser


def main() -> None:
    """Read the flags and write the model."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--model", metavar="RUN", required=True, help="a finished denoiser's run")
    add("--length", metavar="SIGMA_REL", type=float, required=True, help="width of the average over the steps trained")
    add("--step", metavar="N", type=int, help="the average as of this step; the last snapshot's when not given")
    add("--output", metavar="DIR", required=True, help="the new model folder, as generate --model takes it")
    parser.machine(device="")
    args = parser.read()
    from training.stages.rebuild import rebuild

    sys.exit(rebuild(args))
