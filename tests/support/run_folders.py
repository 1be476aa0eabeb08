"""Run folders made by hand: what they hold is known to the last number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from training.pictures import grids

CONFIG: dict[str, Any] = {
    "backbone": {"kind": "unet", "width": 8},
    "prediction": {"kind": "velocity"},
    "train": {"max_steps": 40, "batch_size": 4, "seed": 3},
}
LEVELS = (0.1, 0.5, 0.9)


def loss(step: int) -> float:
    return 2.0 + 1.0 / step


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_folder(
    folder: Path, *, status: str = "finished", steps: int = 40, config: dict[str, Any] | None = None, **told: Any
) -> Path:
    """A denoiser's run of `steps` steps with a validation at 0, 20 and 40, two rows of timing, and three grids."""
    folder.mkdir(parents=True)
    record = {"format": 1, "stage": "denoiser", "status": status, "step": steps, "versions": {"torch": "2.14.1"}}
    record |= {"environment": {"device": "cpu", "processes": 1}, "resumes": [], "ledger": {}, **told}
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "run.json").write_text(json.dumps(record))
    rows: list[dict[str, Any]] = [{"step": n, "lr": 0.001, "loss": loss(n), "grad_norm/denoiser": 0.5}
                                  for n in range(1, steps + 1)]  # fmt: skip
    for step in (0, 20, 40):
        values = {f"val/loss_t{t}": t + 1 / (1 + step) for t in LEVELS}
        rows.insert(step + sum(seen < step for seen in (0, 20, 40)), {"step": step, "val/loss": 1.25, **values})
        home = folder / "samples" / f"step-{step:08d}"
        home.mkdir(parents=True)
        facts = {"captions": ["a <script>alert(1)</script>"]}
        grids.save(Image.new("RGB", (40, 20), (step, 0, 0)), home / "grid.png", facts)
    write_lines(folder / "metrics.jsonl", rows)
    timing = [{"step": 20, "images_per_second": 8.0, "data_wait": 0.5, "memory_bytes": 2**30},
              {"step": 40, "images_per_second": 2.0, "data_wait": 0.0, "memory_bytes": 2**31}]  # fmt: skip
    write_lines(folder / "timing.jsonl", [{**row, "processor_seconds": 15.0} for row in timing])
    return folder
