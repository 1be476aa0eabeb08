"""The recipe that asks what autoencoders keep of the shapes: all of it where pictures come back, nothing of a blank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tiny
import torch

from training.tensors import load_tensors, save_tensors


def test_what_is_kept_of_a_good_and_a_blank_autoencoder(tmp_path: Path) -> None:
    good = tiny.ROOT / "training" / "models" / "demo" / "autoencoder"
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "model.safetensors"
    tensors = load_tensors(file)
    blank = {name: torch.zeros_like(value) for name, value in tensors.items() if name.startswith("decoder.conv_out")}
    save_tensors(file, {**tensors, **blank})
    command = [sys.executable, str(tiny.SCRIPTS / "recipes" / "kept.py"), str(good), str(tmp_path), "--count", "6"]
    done = subprocess.run(command, cwd=tiny.ROOT, env={**tiny.ENVIRONMENT, "PYTHONPATH": "."}, capture_output=True,
                          text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:] == [f"| {good} | 100.0 | 100.0 | 100.0 |", f"| {tmp_path} | 0.0 | 0.0 | 0.0 |"]
