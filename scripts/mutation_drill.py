"""Make each listed mistake in a copy of the code and see that its tests fail; names those that no test notices."""

from __future__ import annotations

import sys
from pathlib import Path

from training.settings.flags import Parser, run_main

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Read the flags and make each mutation."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--list", metavar="FILE", default=str(ROOT / "tests" / "mutations.toml"), help="the mutations")
    add("--only", metavar="WORDS", default="", help="those whose name holds these words")
    add("--limit", metavar="SECONDS", type=float, default=300.0, help="longest run of one mutation's tests")
    add("--debug", action="store_true", help="show tracebacks")
    args = parser.read()
    from training.drills.mutations import main as drill

    sys.exit(drill(args, ROOT))


if __name__ == "__main__":
    run_main(main)
