"""The page of several runs: where their configs differ, their numbers side by side, their curves in the same axes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from training.pages import curves, shown
from training.pages.record import Record
from training.pages.run import cost, missing, tools, what
from training.pictures import html

SIDE_BY_SIDE = 24  # pictures at most
ABSENT = "–"


def names(folders: Sequence[Path]) -> list[str]:
    """What to call each: by its own name, by its place among the others where two are alike, else with a number."""
    whole = [folder.resolve() for folder in folders]
    own = [path.name for path in whole]
    if len(set(own)) == len(own):
        return own
    shared = Path(os.path.commonpath(whole)) if len(set(whole)) > 1 else whole[0]
    if len(shared.parts) > 2 and len(set(whole)) == len(whole):  # not /home, below which are people's names
        return [path.relative_to(shared).as_posix() for path in whole]
    return [f"{name} ({number})" for number, name in enumerate(own, 1)]


def sections(records: Sequence[Record]) -> dict[str, list[str]]:
    """HTML parts by heading."""
    return {
        "Runs": [_table([record.name for record in records], standing(records))],
        "Where the configs differ": differences(records),
        "Last numbers": numbers(records),
        "Curves": curve_section(records),
        "Last pictures": pictures(records),
        "Missing": absences(records),
    }


def lead(records: Sequence[Record]) -> str:
    """What must be known before numbers are held against each other."""
    denoisers = [record for record in records if record.stage == "denoiser"]
    seen = {
        "stages": [record.stage for record in records],
        "data": [record.run.get("data", {}).get("index_sha256") for record in records],
        "autoencoders": [record.run.get("hashes", {}).get("autoencoder") for record in denoisers],
        "objectives": [record.config.get("objective", {}).get("kind", "denoising") for record in denoisers],
        "predictions": [record.config.get("prediction", {}).get("kind") for record in denoisers],
    }
    differing = [name for name, values in seen.items() if len(set(values)) > 1]
    told = (f"These runs have different {name}: their losses are not comparable." for name in differing)
    return html.items(told, "notice")


def standing(records: Sequence[Record]) -> dict[str, list[str]]:
    """State, kinds and cost of each."""
    costs = [cost(record) for record in records]
    rows = {"state": [record.state for record in records], "what": [what(record) for record in records]}
    rows |= {"data": [str(record.run.get("data", {}).get("index_sha256", ABSENT))[:12] for record in records]}
    kept = dict.fromkeys(name for told in costs for name in told)
    return rows | {name: [told.get(name, ABSENT) for told in costs] for name in kept}


def differences(records: Sequence[Record]) -> list[str]:
    """The keys of the configs that are not the same in all runs."""
    flat = [{f"{section}.{key}": value for section, part in record.config.items()
             for key, value in (part.items() if isinstance(part, dict) else ())} for record in records]  # fmt: skip
    rows = {}
    for key in dict.fromkeys(key for config in flat for key in config):
        values = [json.dumps(config[key]) if key in config else ABSENT for config in flat]
        if len(set(values)) > 1:
            rows[key] = values
    if not rows:
        return [html.paragraph("Nowhere: the configs are the same.")]
    about = f"{len(rows)} of the keys differ; {ABSENT} is a key that the run's kinds do not have."
    return [html.paragraph(about), _table([record.name for record in records], rows)]


def numbers(records: Sequence[Record]) -> list[str]:
    """The last value of each number, run beside run."""
    series = [curves.all_series(record) for record in records]
    ordered = curves.names_in_order(name for found in series for name in found)
    rows = {name: [_last(found.get(name, [])) for found in series] for name in ordered}
    told = html.paragraph("The last value that each run tells of, and its step. Single training steps are noisy: "
                          "compare validations.")  # fmt: skip
    return [told, _table([record.name for record in records], rows)] if rows else [html.paragraph("There are none.")]


def _last(points: Sequence[tuple[int, float]]) -> str:
    return f"{html.cell_text(points[-1][1])} (step {points[-1][0]:,})" if points else ABSENT


def curve_section(records: Sequence[Record]) -> list[str]:
    """One pair of axes a number, one line a run."""
    plots = "".join(curves.of_several(records))
    return [*tools(records), f'<div class="plots">{plots}</div>'] if plots else [html.paragraph("There are none.")]


def pictures(records: Sequence[Record]) -> list[str]:
    """The last grid of each run."""
    parts = []
    with_some = [record for record in records if record.grids]
    for record in with_some[:SIDE_BY_SIDE]:
        label, path = list(record.grids.items())[-1]
        title = f"<h3>{escape(record.name)}, {escape(label)}</h3>"
        parts.append(f'<figure class="sheet">{title}{shown.image(path, f"{record.name}, {label}")}</figure>')
    left_out = len(with_some) - len(parts)
    told = [html.paragraph(f"{left_out} run(s) more have pictures: a page holds {SIDE_BY_SIDE}.")] if left_out else []
    return [f'<div class="side">{"".join(parts)}</div>', *told]


def absences(records: Sequence[Record]) -> list[str]:
    """What each run does not have."""
    told = [f"{record.name}: {notice}" for record in records for notice in missing(record)]
    told += [f"{r.name}: no metrics.jsonl." for r in records if r.run and not r.metrics.found]
    told += [f"{record.name}: no pictures." for record in records if not record.grids]
    return [html.items(told) or html.paragraph("Nothing: every run has metrics, pictures and a model.")]


def _table(head: Sequence[str], rows: dict[str, list[Any]]) -> str:
    return f'<div class="scroll">{html.table(("", *head), [[name, *values] for name, values in rows.items()])}</div>'
