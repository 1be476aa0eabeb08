"""The vector-quantised autoencoder of LDM (Esser et al. 2021; Rombach et al. 2022, appendix G)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from autoencoder.base import Autoencoder, full_precision
from autoencoder.blocks import Decoder, Encoder, check_network
from autoencoder.norm import LatentNorm
from autoencoder.quantizer import Quantizer


@dataclass(frozen=True, kw_only=True)
class VQ:
    """Shape of a VQ autoencoder of factor 2^(len(channels) - 1); the default is LDM's vq-f4.

    latent_channels: length of a code, and what stage two sees. encoder_channels: the network's channels beyond the 1x1
    convolutions around the codebook. beta: weight of the commitment term. normalize: codes of length 1, good with few
    latent channels (8) and many codes (LlamaGen). blocks, groups, attention_at as in KL. VQGAN-f16 has channels
    (128, 128, 256, 256, 512), attention_at (16,), 1024 codes of 256. ValueError for what cannot be built.
    """

    kind: Literal["vq"] = "vq"
    channels: tuple[int, ...] = (128, 256, 512)
    blocks: int = 2
    latent_channels: int = 3
    encoder_channels: int = 3
    image_channels: int = 3
    groups: int = 32
    mid_attention: bool = True
    attention_at: tuple[int, ...] = ()
    codes: int = 8192
    beta: float = 0.25
    normalize: bool = False

    def __post_init__(self) -> None:
        check_network(self.channels, self.blocks, self.groups, self.attention_at)
        if min(self.latent_channels, self.encoder_channels, self.image_channels) < 1:
            raise ValueError("latent_channels, encoder_channels and image_channels must be at least 1.")
        if self.codes < 2 or not self.beta >= 0:
            raise ValueError(
                f"a codebook needs at least 2 codes and beta of at least 0, got {self.codes} and {self.beta}."
            )
        if self.normalize and self.latent_channels < 2:
            raise ValueError("codes of length 1 need at least 2 latent_channels when normalize is on.")

    @property
    def factor(self) -> int:
        """Image size over latent size."""
        return 1 << (len(self.channels) - 1)

    def build(self) -> VQAutoencoder:
        """A freshly initialised model (torch's defaults, codes uniform in ±1/codes, seeded by the caller)."""
        return VQAutoencoder(self)


class VQAutoencoder(Autoencoder):
    """Encoder, codebook, decoder; moments are z before quantisation. Keys as diffusers' VQModel, and `norm`.

    `decode` quantises, so stage two models z as it is, under one scalar scale. `regularisation` reads the codebook
    outside `forward`: its gradient must be in the same backward pass as the reconstruction's.
    """

    encoder_parts = ("encoder.", "quant_conv.")

    def __init__(self, config: VQ) -> None:
        super().__init__()
        self.factor = config.factor
        self.image_channels, self.latent_channels = config.image_channels, config.latent_channels
        network = (config.channels, config.blocks, config.groups, config.mid_attention, config.attention_at)
        self.encoder = Encoder(config.image_channels, config.encoder_channels, *network)
        self.decoder = Decoder(config.image_channels, config.encoder_channels, *network)
        self.quant_conv = nn.Conv2d(config.encoder_channels, config.latent_channels, 1)
        self.quantize = Quantizer(config.codes, config.latent_channels, beta=config.beta, normalize=config.normalize)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.encoder_channels, 1)
        self.norm = LatentNorm(config.latent_channels, gaussian=False, shared=True)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = self.encode(images)
        return self._decode(z), z

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images)
        z = full_precision(self.quant_conv(self.encoder(images.to(self.last_layer.dtype))))
        return self.quantize.prepare(z)

    def decode(self, latents: Tensor) -> Tensor:
        self.check_latents(latents)
        return self._decode(self.norm.inverse(latents))

    def _decode(self, z: Tensor) -> Tensor:
        return full_precision(self.decoder(self.post_quant_conv(self.quantize(z).to(self.last_layer.dtype))))

    def regularisation(self, moments: Tensor) -> Tensor:
        return self.quantize.terms(moments)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight
