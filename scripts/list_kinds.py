"""Print the kinds of every family, as README's table of what can be combined; --readme FILE renews the table there."""

from __future__ import annotations

from pathlib import Path

from training.settings.flags import Parser, run_main


def main() -> None:
    """Print the table, or renew it in a file."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--readme", metavar="FILE", type=Path, help="write the table into this file instead")
    parser.machine(device="")
    args = parser.read()
    from training.settings.kinds_table import renew, table

    if args.readme is None:
        print(table(), end="")
    else:
        args.readme.write_text(renew(args.readme.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    run_main(main)
