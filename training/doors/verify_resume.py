"""Prove on your own config and data that an interrupted training ends with the bytes of an uninterrupted one.

All other flags are those of the training, as --batch-size 8 or --backbone.width 64.
"""

from __future__ import annotations

import sys

from training.messages import hush
from training.settings.flags import Parser


def main() -> None:
    """Read the flags and compare both trainings."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--config", metavar="NAME|FILE", default="smoke", help="the config to train")
    add("--data", metavar="DIR", help="packed images: proves stage one")
    add("--latents", metavar="DIR", help="encoded latents: proves stage two")
    add("--teacher", metavar="RUN", help="with --latents: proves the training of a student, as --config progressive")
    add("--steps", metavar="N", type=int, default=9, help="steps of each training")
    add("--folder", metavar="DIR", help="where to keep both trainings; removed when not given")
    parser.machine(device="")
    args, rest = parser.parse_known_args()
    hush(args.quiet)
    from training.drills.verify_resume import verify

    sys.exit(verify(args, rest))
