"""What a run folder says of its training, as far as it is there: finished, growing, damaged, or `final/` alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from training.errors import CHECKPOINT, UserError
from training.files import held
from training.guarding import read_json, refuse_links
from training.messages import printable
from training.runs import folder as runs

LARGEST_LOG = 12 << 20  # bytes of metrics.jsonl that are read in full: some 100,000 steps; of more, every n-th step
ROOTED = re.compile(r"(?:file://|(?<![\w.:/~]))~?/(?:[^\s/'\"]+/)+")  # the folders of an absolute path
GONE = "left without an end"  # of a run whose process is gone

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Log:
    """A file of JSON lines: the finite numbers of each name by step, and what else there was."""

    found: bool = False
    series: dict[str, Points] = field(default_factory=dict)
    odd: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # name -> (step, what it was): nan, infinity
    damaged: int = 0  # lines that are no JSON object with a step
    every: int = 1  # of so many lines of training steps one was read


@dataclass(frozen=True)
class Record:
    """A run folder, read. Texts are free of folders: what is made of them may be shared."""

    folder: Path
    name: str  # what pages call it
    run: dict[str, Any]  # run.json; empty where there is none
    config: dict[str, Any]
    parts: dict[str, Any]  # hashes of what the exported model draws with
    metrics: Log
    timing: Log
    grids: dict[str, Path]  # label -> picture of a validation, in order

    @property
    def stage(self) -> str:
        """autoencoder or denoiser."""
        return str(self.run.get("stage", "denoiser" if "backbone" in self.config else "autoencoder"))

    @property
    def step(self) -> int:
        """The last step that anything tells of."""
        logged = [points[-1][0] for points in self.metrics.series.values()]
        return max([int(self.run.get("step", 0)), *logged])

    @property
    def state(self) -> str:
        """Where the training stands, in a few words."""
        if not self.run:
            return "a model without the run that trained it"
        status, last = self.run["status"], self.config.get("train", {}).get("max_steps", "?")
        if status == "training":
            status = "running" if held(self.folder) else GONE
        return f"{status} at step {self.step:,} of {last if isinstance(last, str) else format(last, ',')}"


def read(folder: Path, name: str = "") -> Record:
    """The record of a run folder, or of an exported model alone. Raises UserError where it is neither."""
    hint = "give the folder that a training wrote, or a model that one exported"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", hint=hint, code=CHECKPOINT)
    refuse_links(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no run", hint=hint, code=CHECKPOINT)
    home = folder / "final" if (folder / "final").is_dir() else folder
    parts = home / "ingredients.json"
    return Record(
        folder=folder,
        name=printable(name or folder.resolve().name),
        run=shareable(runs.record(folder)),
        config=shareable(read_json(folder / "config.json")),
        parts=shareable(read_json(parts)) if parts.is_file() else {},
        metrics=read_log(folder / "metrics.jsonl"),
        timing=read_log(folder / "timing.jsonl"),
        grids=_grids(folder / "samples"),
    )


def read_log(path: Path) -> Log:
    """A file of JSON lines that may still be written to, or have been cut off anywhere."""
    if not path.is_file():
        return Log()
    series: dict[str, Points] = {}
    odd: dict[str, list[tuple[int, str]]] = {}
    every, damaged = -(-path.stat().st_size // LARGEST_LOG) or 1, 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if number % every and b'"val/' not in line:
                continue
            if (row := runs.logged(line)) is None:
                damaged += 1
                continue
            step = row.pop("step")
            for name, value in row.items():
                if value is None:
                    odd.setdefault(name, []).append((step, str(row.get(f"{name}_is", "no number"))))
                elif isinstance(value, int | float) and isfinite(value):
                    series.setdefault(name, []).append((step, float(value)))
                elif isinstance(value, float):
                    odd.setdefault(name, []).append((step, str(value)))
    return Log(found=True, series=series, odd=odd, damaged=damaged, every=every)


def shareable(value: Any) -> Any:
    """Plain data whose texts name files without the folders of this machine."""
    if isinstance(value, Mapping):
        return {shareable(key): shareable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shareable(part) for part in value]
    if not isinstance(value, str):
        return value
    return Path(value).name if value.startswith(("/", "~/")) else ROOTED.sub("", value)


def _grids(samples: Path) -> dict[str, Path]:
    """The pictures of validations by the step they are of, and the exported model's at the end."""
    steps = {path: path.parent.name.rpartition("-")[2] for path in samples.glob("step-*/grid.png")}
    counted = sorted((int(step), path) for path, step in steps.items() if step.isdecimal())
    last = samples / "final" / "grid.png"
    return {f"step {step:,}": path for step, path in counted} | ({"final" : last} if last.is_file() else {})
