"""Measure a run.

An autoencoder: PSNR, SSIM, LPIPS of reconstructions, and their distances as a set, on the val split of --data.
A denoiser: Frechet and kernel distance of generated to held-out pictures, precision, recall, density, coverage, CLIP
score, and how far captions are obeyed; or the likelihood of held-out pictures, or which of several captions each of
them shows, or how well they are restored, or whether drawn pictures repeat training pictures.
"""

from __future__ import annotations

import sys

from training.measuring.flags import add_flags
from training.settings.families import RESTORING, SAMPLING, listing
from training.settings.flags import Parser


def main() -> None:
    """Read the flags and measure."""
    parser = Parser(__doc__ or "", epilog=listing(SAMPLING, RESTORING))
    add_flags(parser)
    args = parser.read_with_keys()
    from training.measuring.evaluate import evaluate

    sys.exit(evaluate(args))
