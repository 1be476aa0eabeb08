"""Measuring the latent normaliser on pictures: what stage one ends with, and taking in another program's model."""

from __future__ import annotations

import torch

from autoencoder.base import Autoencoder
from autoencoder.images import to_unit
from autoencoder.norm import LatentStatistics
from training.data.images import Images

MEASURED = 10_000  # images that stage one measures on


@torch.no_grad()
def fit_norm(model: Autoencoder, images: Images, count: int = MEASURED, size: int = 64) -> None:
    """Set the shift and scale of `model.norm` from about `count` pictures, evenly over the data, `size` at once."""
    statistics = LatentStatistics(model.norm, model.latent_channels)
    stride = max(1, len(images) // count)
    for batch in images.chunks(range(0, len(images), stride)[:count], size, "measuring the scale of latents"):
        statistics.add(model.encode(to_unit(batch.data.to(model.norm.scale.device))))
    statistics.fit()
