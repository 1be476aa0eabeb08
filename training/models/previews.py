"""Tiny autoencoders that stand in for the one they were taught by, and the record of that teacher."""

from __future__ import annotations

from pathlib import Path

import torch

from autoencoder.base import Autoencoder
from training.commands import door
from training.errors import CHECKPOINT, UserError
from training.files import write_json
from training.guarding import make_folder, read_record
from training.models.autoencoders import autoencoder_hashes, load_autoencoder
from training.models.cards import TEACHER
from training.models.folders import find


def teacher_hash(teacher: Autoencoder | None) -> dict[str, str]:
    """What names the teacher of a run, so that it goes on with no other; the lack of one, too."""
    return {"autoencoder": autoencoder_hashes(teacher)["autoencoder"] if teacher else "none"}


def keep_teacher(teacher: Autoencoder | None, home: Path) -> None:
    """Write into `home` (final/) whose latents the model decodes, if another's."""
    if teacher:
        make_folder(home)
        write_json(home / TEACHER, teacher_hash(teacher))


def load_preview(path: str | Path, teacher: str, device: torch.device) -> Autoencoder:
    """The distilled model of a run (finished or not), to stand in for its teacher, the autoencoder of hash `teacher`.

    Raises UserError (exit 4) where it was not distilled, or from another one.
    """
    record = find(path, "autoencoder").final / TEACHER
    if not record.is_file():
        command = door("train_autoencoder --config tiny --teacher RUN --data PICTURES --output DIR")
        hint = f"distil one: {command}"
        raise UserError(f"{path} was not distilled from another autoencoder", hint=hint, code=CHECKPOINT)
    if (recorded := read_record(record, {"autoencoder": str})["autoencoder"]) != teacher:
        raise UserError(
            f"{path} was distilled from autoencoder {recorded[:12]}, the denoiser's is {teacher[:12]}",
            hint="distil one from the denoiser's own: --teacher RUN/final/autoencoder",
            code=CHECKPOINT,
        )
    return load_autoencoder(path, device)
