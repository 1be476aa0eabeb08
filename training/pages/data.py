"""The data of a run, found beside it by their hash: counts, settings, what was left out, and a contact sheet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.files import file_sha256
from training.guarding import gigabytes, read_json
from training.ledger import Ledger
from training.pages.record import Record, shareable
from training.pages.shown import image
from training.pictures import html
from training.shards.index import ENCODING, INDEX, ShardInfo, noted_pictures, read_index

SHEET = "contact-sheet.png"
APART = ("counts", "ledger", "ledgers", "settings", "latent")  # of an index's summary: told by themselves


@dataclass(frozen=True)
class Data:
    """A folder of shards."""

    folder: Path
    index: dict[str, Any]
    shards: list[ShardInfo]


def data_of(record: Record, given: Path | None = None) -> Data | None:
    """The data that a run was trained on: of the folders beside it, and `given`, the one of the same hash."""
    wanted = record.run.get("data", {}).get("index_sha256")
    for folder in _candidates(record.folder, given):
        with suppress(OSError, UserError):
            if wanted and file_sha256(folder / INDEX) == wanted:
                return _opened(folder)
    return None


def pictures_of(latents: Data, record: Record, given: Path | None = None) -> Data | None:
    """The packed pictures that latents were encoded from: `given`, beside them or the run, or where they say."""
    noted = noted_pictures(latents.folder)
    with suppress(UserError):
        wanted = read_json(latents.folder / ENCODING).get("data")
        beside = (*_candidates(latents.folder, given), *_candidates(record.folder, None))
        for folder in (*beside, *([Path(noted)] if noted else [])):
            with suppress(OSError, UserError):
                found = _opened(folder)
                if {shard.name: shard.sha256 for shard in found.shards} == wanted:
                    return found
    return None


def is_of(record: Record, given: Path) -> bool:
    """Whether a folder is the data of a run, or the pictures that these were encoded from."""
    data = data_of(record, given)
    pictures = pictures_of(data, record, given) if data else None
    return any(found and found.folder.samefile(given) for found in (data, pictures))


def section(record: Record, given: Path | None = None) -> list[str]:
    """What is known of a run's data."""
    data = data_of(record, given)
    if data is None:
        told = record.run.get("data", {})
        name = told.get("index_sha256", "")
        where = f"no folder beside the run holds an index.json of the hash {name}" if name else "its hash is not known"
        if stream := told.get("stream"):
            where = f"it was a stream: {', '.join(map(_tar, stream[:8]))}{' …' if stream[8:] else ''}"
        return [html.paragraph(f"The data themselves were not found: {where}.")]
    parts = _described(data)
    if data.index["kind"] == "latents":
        pictures = pictures_of(data, record, given)
        if pictures is None:
            return [*parts, html.paragraph("The pictures that these latents were encoded from do not lie beside them.")]
        return [*parts, "<h3>The pictures they were encoded from</h3>", *_described(pictures)]
    return parts


def _candidates(folder: Path, given: Path | None) -> Iterator[Path]:
    """`given`, then every folder with an index beside `folder` and beside its parent."""
    if given:
        yield given
    home = folder.resolve().parent
    for place in dict.fromkeys((home, home.parent)):
        with suppress(OSError):
            yield from (path for path in sorted(place.iterdir()) if (path / INDEX).is_file())


def _opened(folder: Path) -> Data:
    return Data(folder, *read_index(folder))


def _described(data: Data) -> list[str]:
    """Counts, size and settings, the ledger, and the contact sheet where there is one."""
    summary = shareable(data.index["summary"])
    images = data.index["kind"] == "images"
    counts = {split: sum(s.samples for s in data.shards if s.split == split) for split in ("train", "val", "test")}
    size = gigabytes(sum(shard.bytes for shard in data.shards))
    rows: dict[str, Any] = {"folder": data.folder.resolve().name, "holds": data.index["kind"]}
    rows |= {f"{split} samples": f"{count:,}" for split, count in counts.items() if count}
    rows |= {"shards": f"{len(data.shards):,}, {size}", "fields": ", ".join(data.index["fields"])}
    rows |= {"channels": summary.get("settings", {}).get("channels", 3)} if images else {}
    rows |= {key: _text(value) for key, value in summary.items() if key not in APART}
    rows |= {f"latent {key}": _text(value) for key, value in summary.get("latent", {}).items()}
    lines = ledger_lines(summary.get("ledger"))
    lines += [f"{name}: {line}" for name, part in summary.get("ledgers", {}).items() for line in ledger_lines(part)]
    parts = [html.facts(rows), ledger(lines, "Nothing of the data was left out, cut, guessed or replaced.")]
    if settings := summary.get("settings"):
        parts.append(html.folded("settings of packing", html.facts({key: _text(v) for key, v in settings.items()})))
    if (data.folder / SHEET).is_file():
        sheet = image(data.folder / SHEET, "contact sheet")
        parts.append(f'<figure class="sheet">{sheet}</figure>')
    elif images:
        parts.append(html.paragraph(f"There is no {SHEET} in this folder."))
    return parts


def ledger_lines(report: Any) -> list[str]:
    """A stored ledger for people; a line that says so where it is damaged."""
    book = Ledger()
    try:
        book.merge(report or {})
    except (TypeError, ValueError, LookupError, AttributeError):
        return ["the ledger cannot be read"]
    return book.lines()


def ledger(lines: list[str], empty: str) -> str:
    """A list of a ledger's lines, or a sentence, if any, where there are none."""
    return html.items(lines) or (html.paragraph(empty) if empty else "")


def _tar(name: Any) -> str:
    """A tar of a stream; of a command its first word, for there may be secrets among the others."""
    command, more, _ = str(name).partition(" ")
    return f"{command} …" if more and command.startswith("pipe:") else str(name)


def _text(value: Any) -> str:
    """A plain value for a table."""
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return html.cell_text(value)
