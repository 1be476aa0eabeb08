"""Pages of runs as files: one run's, several runs', and the one that a training renews at every validation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from training.commands import EMBEDDED
from training.errors import CHECKPOINT, USAGE, UserError
from training.files import write_bytes
from training.guarding import check_free, gigabytes, read_plain
from training.messages import answer, note, tell, warn
from training.pages import comparison, run
from training.pages.data import is_of
from training.pages.record import read
from training.pictures import html

if TYPE_CHECKING:
    import argparse

PAGE = "report.html"
HEAD = 400  # bytes in which a page of ours says so


def report(args: argparse.Namespace) -> int:
    """The work of `report`: write the page and say where. Returns the exit code."""
    folders = [Path(name) for name in args.run]
    if named := next((name for name in args.run if name in EMBEDDED and not Path(name).exists()), ""):
        what = f"{named} is the model of the package, without the run that trained it"
        raise UserError(what, hint="give the folder that a training wrote", code=CHECKPOINT)
    if len(folders) > 1 and not args.output:
        raise UserError("a page of several runs belongs to none of them", hint="say where: --output FILE", code=USAGE)
    output = Path(args.output or folders[0] / PAGE)
    data = Path(args.data) if args.data else None
    if data and len(folders) > 1:
        note(f"{data} is not used: a page of several runs does not describe their data")
    elif data and not is_of(read(folders[0]), data):
        warn(f"{data} is not what {folders[0]} was trained on: its index.json has another hash")
    page = several(folders) if len(folders) > 1 else one(folders[0], data)
    if args.output or not is_ours(output):
        check_free(output, args.overwrite)
    write_bytes(output, page)
    answer(f"{output}: {gigabytes(len(page))}")
    return 0


def one(folder: Path, data: Path | None = None) -> bytes:
    """The page of a run; `data` is where its data may lie, besides the folders beside it."""
    record = read(folder)
    return _page(f"{record.name}: {record.state}", run.sections(record, data), run.lead(record))


def several(folders: Sequence[Path]) -> bytes:
    """The page of runs beside each other."""
    records = [read(folder, name) for folder, name in zip(folders, comparison.names(folders), strict=True)]
    title = f"{len(records)} runs: {', '.join(record.name for record in records)}"
    return _page(title, comparison.sections(records), comparison.lead(records))


def is_ours(path: Path) -> bool:
    """Whether a page of this program lies at `path`, which it may renew."""
    try:
        return html.GENERATOR.encode() in read_plain(path, 1 << 30)[:HEAD]
    except (OSError, ValueError):
        return False


def _page(title: str, sections: dict[str, list[str]], lead: str = "") -> bytes:
    home = resources.files("training.pages")
    style, script = ((home / name).read_text("utf-8") for name in ("page.css", "page.js"))
    written = f'<p class="lead">Written {time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}.</p>'
    return html.page(title, sections, lead=lead + written, style=style, script=script).encode()


class Renewed:
    """Writes RUN/report.html each time it is called; what goes wrong is said once, and ends no training."""

    def __init__(self, data: str | Path | None) -> None:
        """`data` is the folder that the run is trained on, where there is one."""
        self.data, self.working, self.told = Path(data) if data else None, True, False

    def __call__(self, folder: Path) -> None:
        if not self.working:
            return
        try:
            if (folder / PAGE).exists() and not is_ours(folder / PAGE):
                raise UserError(f"{folder / PAGE} is another program's")
            write_bytes(folder / PAGE, one(folder, self.data))
            if not self.told:
                tell(f"to look at in a browser: {folder / PAGE}, renewed at every validation")
            self.told = True
        except Exception as failure:
            self.working = False
            warn(f"no more {PAGE} from here on ({failure}); the training goes on")
