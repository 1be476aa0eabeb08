"""Print the kinds of every family, as the table of docs/denoisers.md; --renew FILE renews it there, and that of
proposals in docs/recipes.md."""

from __future__ import annotations

from pathlib import Path

from training.files import write_bytes
from training.messages import answer
from training.settings.flags import Parser, run_main


def main() -> None:
    """Print the table, or renew it in a file."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--renew", metavar="FILE", type=Path, help="renew the tables of this page instead")
    parser.machine(device="")
    args = parser.read()
    from training.settings import kinds_table, recipes_table

    if args.renew is None:
        answer(*kinds_table.table().splitlines())
    else:
        page = args.renew.read_text("utf-8")
        write_bytes(args.renew, recipes_table.renew(kinds_table.renew(page)).encode())


if __name__ == "__main__":
    run_main(main)
