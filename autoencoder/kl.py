"""The KL-regularised convolutional autoencoder of LDM (Rombach et al. 2022, section 3.1 and appendix G)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from autoencoder.base import Autoencoder, full_precision
from autoencoder.blocks import Decoder, Encoder, check_network
from autoencoder.norm import LatentNorm
from autoencoder.posterior import Posterior
from autoencoder.quantizer import Reduce, identity
from autoencoder.recompute import save_memory


@dataclass(frozen=True, kw_only=True)
class KL:
    """Shape of a KL autoencoder of factor 2^(len(channels) - 1).

    blocks: residual blocks per encoder level, one more in the decoder. attention_at: downsampling factors of the levels
    that have attention beside the middle. The LDM family: f4 is channels (128, 256, 512) with 3 latent channels, f8 the
    default, f16 (128, 128, 256, 256, 512) with 16 and attention_at (16,), f32 (128, 128, 256, 256, 512, 512) with 64
    and (16, 32). gradient_checkpointing: blocks are computed again in the backward pass, of which only the inputs are
    kept. ValueError for a shape that cannot be built.
    """

    kind: Literal["kl"] = "kl"
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    groups: int = 32
    mid_attention: bool = True
    attention_at: tuple[int, ...] = ()
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_network(self.channels, self.blocks, self.groups, self.attention_at)
        if self.latent_channels < 1 or self.image_channels < 1:
            raise ValueError("latent_channels and image_channels must be at least 1.")

    @property
    def factor(self) -> int:
        """Image size over latent size."""
        return 1 << (len(self.channels) - 1)

    def build(self) -> KLAutoencoder:
        """A freshly initialised model (torch's default initialisation, seeded by the caller)."""
        return KLAutoencoder(self)


class KLAutoencoder(Autoencoder):
    """Encoder, Gaussian posterior, decoder; moments (B, 2C, h, w). Keys as diffusers' AutoencoderKL, and `norm`."""

    encoder_parts = ("encoder.", "quant_conv.")
    quantize = None

    def __init__(self, config: KL) -> None:
        super().__init__()
        self.factor = config.factor
        self.image_channels, self.latent_channels = config.image_channels, config.latent_channels
        network = (config.channels, config.blocks, config.groups, config.mid_attention, config.attention_at)
        self.encoder = Encoder(config.image_channels, 2 * config.latent_channels, *network)
        self.decoder = Decoder(config.image_channels, config.latent_channels, *network)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.norm = LatentNorm(config.latent_channels)
        save_memory(self, config.gradient_checkpointing)

    def forward(
        self, images: Tensor, noise: Tensor | None, move: Callable[[Tensor], Tensor] = identity
    ) -> tuple[Tensor, Tensor]:
        """(reconstruction, moments (B, 2·latent_channels, h, w)); z by `noise`, or the mode where it is None."""
        moments = self.encode(images)
        posterior = Posterior.split(moments)
        return self._decode(move(posterior.mode() if noise is None else posterior.sample(noise))), moments

    def encode(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) in [-1, 1] -> moments = mean ⊕ logvar (B, 2·latent_channels, h, w) float32."""
        self.check_images(images)
        return full_precision(self.quant_conv(self.encoder(images.to(self.last_layer.dtype))))

    def _decode(self, z: Tensor) -> Tensor:
        return full_precision(self.decoder(self.post_quant_conv(z.to(self.last_layer.dtype))))

    def regularisation(self, moments: Tensor, reduce: Reduce = identity) -> Tensor:
        """KL(q ‖ N(0, 1)) of each image (B,) in nats."""
        return Posterior.split(moments).kl()

    @property
    def last_layer(self) -> Tensor:
        """The weight of the last convolution, where the balance takes its gradients."""
        return self.decoder.conv_out.weight
