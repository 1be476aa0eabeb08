"""Examine an autoencoder: one HTML page and a JSON of what its latents and reconstructions are like.

Per-channel statistics, spectrum, equivariance, sensitivity to noise, codes, reconstruction with 95 % intervals, and a
probe: a small denoiser of fixed seed and budget, trained on its latents, by which autoencoders of the same pictures
rank. The probe tells which latents are learnt soonest, not how a large denoiser fares after a long training.
"""

from __future__ import annotations

import sys

from training.measuring.flags import FEATURES
from training.settings.flags import Parser


def main() -> None:
    """Read the flags and write the page."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("model", metavar="RUN", help="a stage-one run, its final/ or a checkpoint; or demo")
    add("--data", metavar="DIR", required=True, help="packed pictures: val is measured, train teaches the probe")
    add("--output", metavar="DIR", required=True, help="where inspection.html and inspection.json go")
    add("--overwrite", action="store_true", help="replace these files where they are there")
    add("--count", metavar="N", type=int, default=1000, help="held-out pictures measured; 0 = all")
    add("--batch-size", metavar="N", type=int, default=32, help="pictures at once")
    add("--lpips", metavar="WEIGHTS", help="also LPIPS: standard, random, or a file of backbone weights")
    add("--lpips-net", choices=("vgg", "alex", "squeeze"), default="vgg", help="backbone of LPIPS")
    add("--features", metavar="NET", default="random", help=FEATURES)
    add("--probe-steps", metavar="N", type=int, default=300, help="training steps of the probe; 0 = no probe")
    add("--probe-samples", metavar="N", type=int, default=256, help="pictures that the probe draws")
    parser.machine()
    args = parser.read()
    from training.measuring.inspection import inspect

    sys.exit(inspect(args))
