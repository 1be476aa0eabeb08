"""Kill a small training at random moments, resume it each time, and compare its end with that of a calm one."""

from __future__ import annotations

import sys

from training.settings.flags import Parser


def main() -> None:
    """Read the flags, then train and kill."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--stage", choices=("autoencoder", "denoiser"), default="autoencoder", help="what to train")
    add("--kills", metavar="N", type=int, default=100, help="kills in all")
    add("--steps", metavar="N", type=int, default=40, help="steps of each training")
    add("--seed", type=int, default=0, help="seed of the moments")
    add("--folder", metavar="DIR", help="where to work; a temporary folder when not given")
    parser.machine(device="")
    args = parser.read()
    from training.drills.soak import soak

    sys.exit(soak(args))
