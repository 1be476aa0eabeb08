"""Print the kinds of every family, as the table of docs/denoisers.md; --renew FILE renews it there."""

from __future__ import annotations

from pathlib import Path

from training.files import write_bytes
from training.messages import answer
from training.settings.flags import Parser, run_main


def main() -> None:
    """Print the table, or renew it in a file."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--renew", metavar="FILE", type=Path, help="write the table into this page instead")
    parser.machine(device="")
    args = parser.read()
    from training.settings.kinds_table import renew, table

    if args.renew is None:
        answer(*table().splitlines())
    else:
        write_bytes(args.renew, renew(args.renew.read_text("utf-8")).encode())


if __name__ == "__main__":
    run_main(main)
