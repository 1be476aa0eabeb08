"""Rows G4 and A5 of the battery of faults, through the scripts: settings that do not go together, and a run that is
wholly damaged, are told before anything is built or written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny

from training.machine import faults

# flags -> the two keys and the nearest values that the message names
CROSSING = {
    "--batch-size 32 --micro-batch-size 5": ("train.batch_size 32", "train.micro_batch_size 5", "30 or 35"),
    "--batch-size 32 --gradient-accumulation-steps 3": ("train.batch_size 32", "3 accumulation step(s)", "30 or 33"),
    "--model.groups 3": ("channels 8", "groups 3", "6 or 9"),
    "--model.channels 8,8,8,8,8,8,8": ("pictures are 32x32", "factor 64", "--resolution 64"),
    "--discriminator.layers 5": ("pictures are 32x32", "discriminator needs", "discriminator.layers (now 5)"),
}


@pytest.mark.parametrize("flags", CROSSING)
def test_g4_both_keys_and_the_nearest_values(flags: str, shapes: Path, tmp_path: Path) -> None:
    words = ("--data", shapes, "--output", tmp_path / "run", *tiny.AUTOENCODER, *flags.split())
    problem = tiny.refused("train_autoencoder", *words)
    assert problem.code == 2 and all(part in f"{problem.what} {problem.hint}" for part in CROSSING[flags]), problem
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a5_a_run_whose_checkpoints_are_all_damaged_never_starts_from_zero(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    words = ("train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER, "--save-every", "2")
    faults.visits.clear()
    monkeypatch.setenv("LDM_FAULT", "step:5=term")
    assert tiny.call(*words) == 143
    monkeypatch.delenv("LDM_FAULT")
    found = sorted((run / "checkpoints").glob("step-*"))
    for path in found:
        os.truncate(path / "ema.safetensors", 7)
    before = (run / "metrics.jsonl").read_bytes()
    for resume in ("auto", "latest", found[-1].name):
        problem = tiny.refused(*words, "--resume", resume)
        assert problem.code == 4, problem
        if resume != found[-1].name:
            assert problem.what == f"no usable checkpoint in {run}/checkpoints ({len(found)} found, all damaged)"
            assert all(f"{path.name} is damaged (ema.safetensors: size differs)" in problem.hint for path in found)
    assert len(found) == 2 and (run / "metrics.jsonl").read_bytes() == before
