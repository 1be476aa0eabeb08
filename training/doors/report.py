"""One HTML page of a run, or of several beside each other: curves, pictures, data, cost, hashes, how to repeat it.

The page holds all it shows and loads nothing, so that it can be sent and opened anywhere. A training writes its own
as RUN/report.html at every validation.
"""

from __future__ import annotations

import sys

from training.settings.flags import Parser


def main() -> None:
    """Read the flags and write the page."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("run", metavar="RUN", nargs="+", help="a run folder, also while it trains, or an exported model alone")
    add("--output", metavar="FILE", help="the page (default: RUN/report.html, renewed); several runs need it")
    add("--overwrite", action="store_true", help="replace a file that is there")
    add("--data", metavar="DIR", help="the run's data or latents, where they do not lie beside it")
    parser.machine(device="")
    args = parser.read()
    from training.pages.writing import report

    sys.exit(report(args))
