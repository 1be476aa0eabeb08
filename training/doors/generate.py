"""Make pictures from captions with a trained denoiser; edit pictures and restore them with it.

Samplers, grids and guidances are chosen by name; their own settings as --sampler.KEY, --grid.KEY, --guidance.KEY.
"""

from __future__ import annotations

from training.drawing.flags import add_flags
from training.settings.families import COUPLING, RESTORING, SAMPLING, listing
from training.settings.flags import Parser


def main() -> None:
    """Read the flags and draw."""
    parser = Parser(__doc__ or "", epilog=listing(SAMPLING, RESTORING, COUPLING))
    add_flags(parser)
    args = parser.read_with_keys()
    from training.drawing.generate import generate

    generate(args)
