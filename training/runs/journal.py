"""The log of a run: one progress line, metrics.jsonl (step-determined values), timing.jsonl, and its trackers."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.files import finite, sync_folder
from training.guarding import disk_error, open_own
from training.machine.faults import fault
from training.machine.memory import peak_memory
from training.messages import duration, per_second, tell, warn
from training.progress import Progress
from training.runs.trackers import Trackers
from training.settings.sections import Train

if TYPE_CHECKING:
    from accelerate import Accelerator


class Journal:
    """Collects values on the device and writes them every `log_every` steps: logging does not synchronise each step."""

    def __init__(self, run: Path, train: Train, accelerator: Accelerator) -> None:
        self.run, self.train, self.accelerator = run, train, accelerator
        self.rows: list[tuple[int, dict[str, Tensor], float]] = []
        self.waited, self.since, self.first, self.worked = 0.0, time.perf_counter(), -1, time.process_time()
        self.progress = Progress("training", train.max_steps, "step", pause=60.0, aloud=accelerator.is_main_process)
        self.trackers = Trackers()  # none but where a training asks for some
        if accelerator.is_main_process:
            run.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def record(self, step: int, values: dict[str, Tensor], rate: float) -> None:
        """Note the values of `step`; write and show them when it is time."""
        self.rows.append((step, values, rate))
        self.progress.at(step)
        if step % self.train.log_every == 0 or step == self.train.max_steps:
            self.flush(step)

    def cut(self, step: int) -> None:
        """Forget the noted steps after `step`."""
        self.rows = [row for row in self.rows if row[0] <= step]

    def flush(self, step: int) -> None:
        """Write all noted steps, averaged over processes. Collective: every process calls it at the same step."""
        if not self.rows:
            return
        flat = [values[n].detach().float().reshape(()) for _, values, _ in self.rows for n in sorted(values)]
        numbers = iter(self.accelerator.reduce(torch.stack(flat), "mean").tolist())
        rows = [{"step": s, "lr": rate, **{n: next(numbers) for n in sorted(values)}} for s, values, rate in self.rows]
        self.rows = []
        if self.accelerator.is_main_process:
            self._append("metrics.jsonl", rows)
            self._show(step, rows)
            self.trackers.log((row["step"], {f"train/{n}": row[n] for n in row.keys() - {"step"}}) for row in rows)

    def look(self, step: int, numbers: dict[str, float], folder: Path) -> None:
        """Write the numbers and pictures of an evaluation (main process)."""
        values = {f"val/{name}": number for name, number in numbers.items()}
        self._append("metrics.jsonl", [{"step": step, **values}])
        tell(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()) + f"  -> {folder}")
        self.trackers.log([(step, values)])
        self.trackers.show(folder, step)
        self.since, self.waited, self.first = time.perf_counter(), 0.0, step  # looking is not training time
        self.worked = time.process_time()

    def state(self) -> dict[str, Any]:
        """Plain state for checkpoints: how far metrics.jsonl reached, and that far it is on disk."""
        path = self.run / "metrics.jsonl"
        if not path.exists():
            return {"metrics_bytes": 0}
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sync_folder(self.run)  # the file's name, too, which may be new
        return {"metrics_bytes": path.stat().st_size}

    def resume(self, step: int, state: dict[str, Any]) -> None:
        """Cut metrics.jsonl and timing.jsonl back to the checkpoint: no step is told twice."""
        self.first = step
        self.progress.skip(max(0, step) - int(self.progress.done))  # a rollback goes on from the step it is at
        path, expected = self.run / "metrics.jsonl", int(state["metrics_bytes"])
        if not self.accelerator.is_main_process:
            return
        size = path.stat().st_size if path.exists() else 0
        if size < expected:
            warn(f"{path} has {size:,} bytes where step {step} left {expected:,}: steps before it are missing there")
        elif path.exists():
            with open_own(path, "r+b") as file:
                file.truncate(expected)
        _cut_after(self.run / "timing.jsonl", step)

    def restart(self) -> None:
        """A run without a checkpoint starts over: what it had written is not part of it."""
        self.resume(-1, {"metrics_bytes": 0})

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        path = self.run / name
        try:
            fault("metrics")
            with open_own(path, "a") as file:
                file.writelines(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows)
        except OSError as failure:
            raise disk_error(path, failure) from None

    def _show(self, step: int, rows: list[dict[str, Any]]) -> None:
        now, done = time.perf_counter(), step - max(self.first, rows[0]["step"] - 1)
        seconds = (now - self.since) / max(1, done)
        share = self.waited / max(1e-9, now - self.since)
        self.since, self.waited, self.first = now, 0.0, step
        cuda = self.accelerator.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if cuda else peak_memory()
        rate = self.train.batch_size / seconds
        row = {"step": step, "images_per_second": rate, "data_wait": share, "memory_bytes": memory}
        worked, self.worked = self.worked, time.process_time()
        self._append("timing.jsonl", [{**row, "processor_seconds": self.worked - worked}])  # of all its threads
        left = duration(seconds * (self.train.max_steps - step))
        tell(
            f"step {step}/{self.train.max_steps}  {losses(rows)}  lr {rows[-1]['lr']:.2e}  "
            f"{per_second(1 / seconds, 'step')}  {per_second(rate)}  {left} left  "
            f"memory {memory / 2**30:.2f} GiB  waiting for data {share:.0%}"
        )
        self.progress.told()


def losses(rows: list[dict[str, Any]]) -> str:
    """The mean loss of the steps; where networks take turns, or several losses are told and no sum of them, of each by
    itself, over the steps that have it."""
    names = ["loss"] if all("loss" in row for row in rows) else sorted({name for row in rows for name in row})
    found = {name: [row[name] for row in rows if name in row] for name in names if name.startswith("loss")}
    return "  ".join(f"{name} {sum(values) / len(values):.4f}" for name, values in found.items())


def _cut_after(path: Path, step: int) -> None:
    """Cut a file of JSON lines before the first of a later step, or one that was not written to its end."""
    if not path.exists():
        return
    with open_own(path, "r+b") as file:
        kept = 0
        for line in file:
            found = re.match(rb'\{"step": (\d+)[,}].*\n', line)
            if not found or int(found[1]) > step:
                break
            kept += len(line)
        file.truncate(kept)
