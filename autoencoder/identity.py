"""An autoencoder that changes nothing: latents are the pixels, so that diffusion in pixels is the same system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from autoencoder.base import WithoutPosterior, full_precision
from autoencoder.norm import LatentNorm
from autoencoder.quantizer import Reduce, identity


@dataclass(frozen=True, kw_only=True)
class Identity:
    """encode = decode = identity: factor 1, and as many latent channels as the pictures have. ValueError for none."""

    kind: Literal["identity"] = "identity"
    image_channels: int = 3

    def __post_init__(self) -> None:
        if self.image_channels < 1:
            raise ValueError("image_channels must be at least 1.")

    @property
    def factor(self) -> int:
        """Image size over latent size."""
        return 1

    @property
    def latent_channels(self) -> int:
        """Channels of z: those of the picture."""
        return self.image_channels

    def build(self) -> IdentityAutoencoder:
        """The model, whose normaliser stays at shift 0 and scale 1."""
        return IdentityAutoencoder(self)


class IdentityAutoencoder(WithoutPosterior):
    """images (B, C, H, W) in [-1, 1] are z and the latents. No parameters: the state is the normaliser alone."""

    encoder_parts = ()
    quantize = None

    def __init__(self, config: Identity) -> None:
        super().__init__()
        self.factor = config.factor
        self.image_channels = self.latent_channels = config.image_channels
        self.norm = LatentNorm(config.image_channels, gaussian=False)

    def encode(self, images: Tensor) -> Tensor:
        """The images themselves, float32 or better."""
        self.check_images(images)
        return full_precision(images)

    def _decode(self, z: Tensor) -> Tensor:
        return full_precision(z)

    def regularisation(self, moments: Tensor, reduce: Reduce = identity) -> Tensor:
        """0 for each image."""
        return moments.new_zeros(len(moments))

    @property
    def last_layer(self) -> Tensor:
        """There is none. Raises ValueError."""
        raise ValueError("an identity autoencoder has no layer, and nothing to train.")
