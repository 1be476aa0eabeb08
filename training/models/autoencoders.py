"""Autoencoders of runs: loaded, hashed, and checked for what is asked of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import CHECKPOINT, UserError
from training.models.folders import fill, find, weights
from training.settings import decoding
from training.tensors import content_hash

if TYPE_CHECKING:
    import torch

    from autoencoder.base import Autoencoder


SMALLEST_TILE = 16  # latents; neighbours share a quarter of them


def check_tile(tile: int) -> None:
    """Raises UserError for tiles too small to overlap."""
    if tile and tile < SMALLEST_TILE:
        raise UserError(f"--tile: must be 0 (off) or at least {SMALLEST_TILE} (got {tile})")


def load_autoencoder(path: str | Path, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder of a run (averaged weights), frozen, in eval mode."""
    found = find(path, "autoencoder")
    settings = found.config()
    assert isinstance(settings, decoding.AutoencoderConfig)
    model: Autoencoder = settings.model.build()
    fill(model, weights(found.weights, "autoencoder"), found.weights)
    return model.to(device).eval().requires_grad_(False)


def autoencoder_hashes(model: Autoencoder) -> dict[str, str]:
    """`encoder`: what latents depend on; `autoencoder`: what pictures depend on (decoder and normaliser too)."""
    return {"encoder": content_hash(model.encoder_state()), "autoencoder": content_hash(model.state_dict())}


def finished_autoencoder(path: str) -> Path:
    """The folder of a finished stage-one run's config.json. Raises UserError where its latents have no scale yet."""
    folder = find(path, "autoencoder")
    if not folder.finished:
        raise UserError(
            f"{path}: the autoencoder is not finished (its latent normaliser is measured last)",
            hint="let its training end first",
            code=CHECKPOINT,
        )
    return folder.home
