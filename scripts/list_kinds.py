"""Print the kinds of every family, as README's table of what can be combined; --readme and --recipes renew tables."""

from __future__ import annotations

from pathlib import Path

from training.files import write_bytes
from training.messages import answer
from training.settings.flags import Parser, run_main


def main() -> None:
    """Print the table, or renew it in a file."""
    parser = Parser(__doc__ or "")
    parser.add_argument("--readme", metavar="FILE", type=Path, help="write the table into this file instead")
    parser.add_argument("--recipes", metavar="FILE", type=Path, help="renew the table of proposals in docs/recipes.md")
    parser.machine(device="")
    args = parser.read()
    from training.settings import kinds_table, recipes_table

    asked = [(args.readme, kinds_table.renew), (args.recipes, recipes_table.renew)]
    for path, renew in asked:
        if path:
            write_bytes(path, renew(path.read_text("utf-8")).encode())
    if not any(path for path, _ in asked):
        answer(*kinds_table.table().splitlines())


if __name__ == "__main__":
    run_main(main)
