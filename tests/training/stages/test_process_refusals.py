"""Times that a schedule does not have are refused when a training is put together, not when it first draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

REFUSED = {
    "--grid.kind given --grid.times 1,0.5,1e-7,0 --sample.steps 3": "given times above 0 must be at least",
    "--grid.kind given --grid.times 1,0.5,0 --sample.steps 3": "3 given times make 2 steps",
    "--schedule.kind ddpm-linear --schedule.steps 10 --sample.steps 11": "at most 10 steps",
    "--schedule.kind vp --times.kind uniform --times.shift 3": "where the schedule ends in pure noise",
    "--schedule.kind ddpm-cosine --grid.kind uniform --grid.shift 3": "a DDPM table itself takes schedule.shift",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused_when_built(flags: str, latents: Path, tmp_path: Path) -> None:
    words = ("--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER, "--dry-run", *flags.split())
    refused = tiny.refused("train_denoiser", *words)
    assert REFUSED[flags] in refused.what and refused.code == 2


@pytest.mark.parametrize("flags", ["--schedule.kind ddpm-cosine --schedule.shift 4", "--times.shift 3 --grid.shift 3"])
def test_what_a_schedule_has_is_taken(flags: str, latents: Path, tmp_path: Path) -> None:
    words = ("--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER, "--dry-run", *flags.split())
    assert tiny.call("train_denoiser", *words) == 0
