"""The family of feature networks, by the word that `--features` begins with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from training.measuring.networks import classifier, embeddings, inception, random_convolutions
from training.measuring.networks.base import Features

__all__ = ["NETWORKS", "Features", "load_features"]

NETWORKS: dict[str, Callable[[str, torch.device | str], Features]] = {
    "random": random_convolutions.load,
    "inception": inception.load_fid,
    "torchvision-inception": inception.load_torchvision,
    "dinov2": embeddings.load_dinov2,
    "clip": embeddings.load_clip,
}


def load_features(spec: str, device: torch.device | str = "cpu") -> Features:
    """`random`, KIND:FILE|DIR|NAME of `NETWORKS`, or the folder of a classifier.

    Raises UserError where there is no such network, never falling back by itself.
    """
    kind, _, rest = spec.partition(":")
    return NETWORKS[kind](rest, device) if kind in NETWORKS else classifier.load(spec, device)
