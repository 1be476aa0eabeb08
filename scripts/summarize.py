"""Put together what the runs of a recipe say: `summarize.py quickstart DIR`, `summarize.py autoencoders DIR`.

quickstart: the score of scripts/quickstart.sh, also written to DIR/summary.json. autoencoders: the tables of
scripts/recipes/compare_autoencoders.sh, in Markdown.
"""

from __future__ import annotations

from pathlib import Path

from training.messages import answer
from training.settings.flags import Parser, run_main


def main() -> None:
    """Print the summary of a recipe's runs."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("what", choices=("quickstart", "autoencoders"), help="which recipe's runs")
    add("folder", metavar="DIR", type=Path, help="the folder it was given as --output")
    add("--seconds", metavar="N", type=int, default=0, help="quickstart: how long it took in all")
    parser.machine(device="")
    args = parser.read()
    from training.measuring.summaries import autoencoders, quickstart

    lines = quickstart(args.folder, args.seconds) if args.what == "quickstart" else autoencoders(args.folder)
    for line in lines:
        answer(line)


if __name__ == "__main__":
    run_main(main)
