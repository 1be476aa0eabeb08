"""Tiny students of tiny teachers."""

from __future__ import annotations

from pathlib import Path

import tiny

BRIEF = ["--device", "cpu", "--batch-size", "8", "--save-every", "100", "--sample-every", "100",
         "--train.validation_size", "4"]  # fmt: skip
SHORT = ["--config", "progressive", "--objective.from_steps", "2", "--objective.steps", "1", *BRIEF]



def distill(teacher: Path, latents: Path, *words: object) -> int:
    """The exit code of a short training of a student."""
    return tiny.call("distill_denoiser", "--teacher", teacher, "--latents", latents, *SHORT, "--max-steps", 2, *words)


def student(teacher: Path, latents: Path, output: Path, *words: object) -> Path:
    """A finished student of one step, of a teacher with weights that hear captions."""
    assert distill(teacher, latents, "--output", output, *words) == 0
    return output
