"""The folder of a classifier that the user trained on the data: its features before the last layer."""

from __future__ import annotations

from pathlib import Path

import torch

from training.errors import DATA, UserError
from training.measuring.networks.base import Features
from training.models.judge import load_classifier
from training.tensors import content_hash


def load(folder: str, device: torch.device | str) -> Features:
    """The classifier in `folder`. Raises UserError where there is none."""
    if not (Path(folder) / "model.safetensors").is_file():
        raise UserError(
            f"--features {folder}: no such feature network",
            code=DATA,
            hint="use random, inception:FILE, dinov2:DIR, clip:DIR, or the folder of a train_classifier",
        )
    model = load_classifier(folder, device)
    weights = content_hash(model.state_dict())
    facts = {"weights": weights, "preprocessing": "[-1, 1], as large as they are"}
    return Features(f"classifier {weights[:12]}", model.head.in_features, model.features, facts)
