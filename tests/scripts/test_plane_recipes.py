"""The recipes of adjoint matching and of critically damped Langevin, in the plane: a few steps of each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import tiny
from PIL import Image


def told(recipe: str, *words: object) -> str:
    command = [sys.executable, *map(str, [tiny.SCRIPTS / "recipes" / f"{recipe}.py", *words])]
    done = subprocess.run(command, cwd=tiny.ROOT, env={**tiny.ENVIRONMENT, "PYTHONPATH": "."}, capture_output=True,
                          text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_clusters_are_counted() -> None:
    """The data's are as many each, what has to come grows by the reward, and learning goes that way."""
    rows = [line.replace("%", "").split() for line in told("adjoint_matching", "--updates", 5).splitlines()]
    first = {row[0] + row[1] + row[2]: [float(word) for word in row if word.replace(".", "").isdigit()] for row in rows}
    even, wanted, learned, _ = first.values()
    assert len(first) == 4 and all(len(row) == 9 and abs(sum(row[:8]) - 100) < 0.5 for row in first.values())
    assert max(even[:8]) - min(even[:8]) < 3 and even[8] == 0
    exact = [34.0, 21.9, 7.6, 2.6, 1.7, 2.6, 7.6, 21.9]
    assert max(abs(a - b) for a, b in zip(wanted[:8], exact, strict=True)) < 2.5
    assert learned[0] > even[0] + 1 and learned[4] < even[4] - 1 and learned[8] < 5


def test_a_sheet_of_four_clusters(tmp_path: Path) -> None:
    """The noise at the left fills the square; the data at the right are within half a unit of the corners."""
    told("critically_damped", "--output", tmp_path, "--steps", 3)
    sheet = np.asarray(Image.open(tmp_path / "damped.png").convert("L")).astype(int)
    assert sheet.shape == (200, 600)
    cells = 255.0 - sheet.reshape(2, 100, 6, 100)[:, :96, :, :96].transpose(0, 2, 1, 3)
    y, x = (abs(each - 47.5) / 24 for each in np.mgrid[:96, :96])  # 48 pixels are 2
    near = np.hypot(x - 1, y - 1) < 0.5
    noise, data = cells[0, 0], cells[0, 5]
    assert data[near].sum() > 0.98 * data.sum() > 0 and 0 < noise[near].sum() < 0.5 * noise.sum()
