"""The recipe of score distillation writes its sheet: every seed from its noise to the end, and a sampler's drawing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import tiny
from PIL import Image

from training.models.assembly import load_pipeline
from training.pictures.grids import facts


def test_a_sheet_of_score_distillation(tmp_path: Path) -> None:
    words = ["--output", tmp_path / "out", "--prompt", "a blue square", "--scale", 5, "--steps", 6]
    command = [sys.executable, *map(str, [tiny.SCRIPTS / "recipes" / "score_distillation.py", *words])]
    done = subprocess.run(command, cwd=tiny.ROOT, env={**tiny.ENVIRONMENT, "PYTHONPATH": "."}, capture_output=True,
                          text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out" / "distilled.png"
    said, sheet = facts(path), np.asarray(Image.open(path)).astype(int)
    assert (said["prompt"], said["scale"], said["steps"]) == ("a blue square", 5, 6)
    left = sheet.shape[1] - 5 * 100  # cells of 96 pixels, 4 between
    assert left > 0 and sheet.shape[0] == 400
    cells = sheet[:, left:].reshape(4, 100, 5, 100, 3)[:, :96, :, :96].transpose(0, 2, 1, 3, 4)[:, :, 1::3, 1::3]
    moved = np.abs(cells[:, 1:4] - cells[:, :3]).mean((0, 2, 3, 4))
    assert (moved > 0).all(), "latents moved from each column to the next"
    drawn = [np.asarray(picture) for picture in load_pipeline("demo", "cpu")(["a blue square"] * 4, seeds=[0, 1, 2, 3])]
    assert np.abs(cells[:, 4] - np.stack(drawn)).max() <= 2
