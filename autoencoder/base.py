"""What every autoencoder of stage one offers to training, to stage two and to export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoencoder.norm import LatentNorm
from autoencoder.quantizer import Codebook, Reduce, identity


def full_precision(x: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def size_in_words(module: object) -> str:
    """Their number, in words: "4.9 M parameters"; none where it is no module."""
    count = sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else 0
    for size, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            return f"{count / size:.1f}{unit} parameters"
    return f"{count} parameters"


class Autoencoder(nn.Module, ABC):
    """images in [-1, 1] (B, image_channels, H, W) <-> z (B, latent_channels, H/factor, W/factor).

    `moments` are what the encoder gives: mean ⊕ logvar (B, 2C, h, w) for a posterior, z (B, C, h, w) otherwise.
    """

    factor: int
    image_channels: int
    latent_channels: int
    norm: LatentNorm
    quantize: Codebook | None  # what z is replaced by inside `decode`
    encoder_parts: tuple[str, ...]  # prefixes of the state that decides the moments

    def __repr__(self) -> str:
        latents = f"{self.latent_channels} channels at 1/{self.factor} of the size"
        return f"autoencoder {type(self).__name__}: {size_in_words(self)}, {self.image_channels} channels to {latents}"

    @abstractmethod
    def forward(
        self, images: Tensor, noise: Tensor | None, move: Callable[[Tensor], Tensor] = identity
    ) -> tuple[Tensor, Tensor]:
        """(reconstruction, moments); noise (B, C, h, w) ~ N(0, I), None = posterior mean. The only call in training.

        `move` maps the z that is decoded, for what compares the decoder's answer with a moved image.
        """

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """images -> moments, un-normalised, float32 or better."""

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents -> images, float32 or better, not clipped."""
        self.check_latents(latents)
        return self._decode(self.norm.inverse(latents))

    @abstractmethod
    def _decode(self, z: Tensor) -> Tensor:
        """Raw z -> images, float32 or better."""

    @abstractmethod
    def regularisation(self, moments: Tensor, reduce: Reduce = identity) -> Tensor:
        """The latent regulariser per image (B,), from the moments of `forward`: KL in nats or a quantiser's terms.

        `reduce` averages a tensor over processes, for terms that couple the whole batch.
        """

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, where the adaptive adversarial weight compares gradients."""

    def encoder_state(self) -> dict[str, Tensor]:
        """The part of the state dict that decides the moments; its hash names latents."""
        return {key: value for key, value in self.state_dict().items() if key.startswith(self.encoder_parts)}

    def check_images(self, images: Tensor) -> None:
        """ValueError unless images are (B, image_channels, H, W) with H and W divisible by the factor."""
        if images.ndim != 4 or images.shape[1] != self.image_channels:
            raise ValueError(
                f"images must be (batch, {self.image_channels}, height, width), got {tuple(images.shape)}."
            )
        height, width = images.shape[2:]
        if height % self.factor or width % self.factor or not height or not width:
            raise ValueError(
                f"image size {height}x{width} must be divisible by the autoencoder's factor {self.factor}."
            )

    def check_latents(self, latents: Tensor) -> None:
        """ValueError unless latents are (B, latent_channels, h, w)."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents must be (batch, {self.latent_channels}, height, width), got {tuple(latents.shape)}."
            )


class WithoutPosterior(Autoencoder):
    """An autoencoder whose moments are z itself, as it is decoded."""

    def forward(
        self, images: Tensor, noise: Tensor | None = None, move: Callable[[Tensor], Tensor] = identity
    ) -> tuple[Tensor, Tensor]:
        """(reconstruction (B, C, H, W), z (B, latent_channels, h, w)); without a posterior, `noise` is not used."""
        z = self.encode(images)
        return self._decode(move(z)), z


class Unregularised(WithoutPosterior):
    """An encoder and a decoder, and nothing that holds z but the network (or a teacher)."""

    encoder: nn.Module
    decoder: nn.Module
    encoder_parts = ("encoder.",)
    quantize = None

    def encode(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) in [-1, 1] -> z (B, latent_channels, h, w) float32."""
        self.check_images(images)
        return full_precision(self.encoder(images.to(self.last_layer.dtype)))

    def _decode(self, z: Tensor) -> Tensor:
        return full_precision(self.decoder(z.to(self.last_layer.dtype)))

    def regularisation(self, moments: Tensor, reduce: Reduce = identity) -> Tensor:
        """0 for each image."""
        return moments.new_zeros(len(moments))
