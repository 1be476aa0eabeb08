"""Which config of ours a step proposes for the one that follows, by the size of what is trained on. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

SMALL, MIDDLE = 32, 64  # pixels a side up to which the configs of factor 4 and of small networks are meant
FEW = 64  # places of a latent up to which the smallest denoiser is meant


def autoencoder_for(side: int) -> str:
    """The config of stage one for pictures of `side` pixels; 0: not known."""
    if 0 < side <= SMALL:
        return "quickstart"
    return "emoji" if 0 < side <= MIDDLE else "kl-f8"


def denoiser_for(size: Sequence[int]) -> str:
    """The config of stage two for latents of `size`, (h, w)."""
    return "quickstart" if prod(size) <= FEW else "dit-s"
