"""Quantising autoencoders: LDM's VQ (Esser et al. 2021; Rombach et al. 2022, appendix G) and its codebook-free kin."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from autoencoder.base import WithoutPosterior, full_precision
from autoencoder.blocks import Decoder, Encoder, check_network
from autoencoder.norm import LatentNorm
from autoencoder.quantizer import Codebook, Quantizer, Reduce, identity
from autoencoder.recompute import save_memory
from autoencoder.scalar_quantizers import FiniteScalar, LookupFree


@dataclass(frozen=True, kw_only=True)
class Quantised(ABC):
    """Shape of a quantising autoencoder of factor 2^(len(channels) - 1); blocks, groups, attention_at as in KL.

    encoder_channels: the network's channels beyond the 1x1 convolutions around the codebook. gradient_checkpointing as
    in KL.
    """

    channels: tuple[int, ...] = (128, 256, 512)
    blocks: int = 2
    encoder_channels: int = 3
    image_channels: int = 3
    groups: int = 32
    mid_attention: bool = True
    attention_at: tuple[int, ...] = ()
    gradient_checkpointing: bool = False

    def check(self) -> None:
        """ValueError for a network that cannot be built."""
        check_network(self.channels, self.blocks, self.groups, self.attention_at)
        if min(self.code_length, self.encoder_channels, self.image_channels) < 1:
            raise ValueError("latent_channels, encoder_channels and image_channels must be at least 1.")

    @property
    @abstractmethod
    def code_length(self) -> int:
        """Channels of a code, and of what stage two sees."""

    @abstractmethod
    def codebook(self) -> Codebook:
        """The codes, freshly initialised."""

    @property
    def factor(self) -> int:
        """Image size over latent size."""
        return 1 << (len(self.channels) - 1)

    def build(self) -> VQAutoencoder:
        """A freshly initialised model (torch's defaults, codes uniform in ±1/codes, seeded by the caller)."""
        return VQAutoencoder(self)


@dataclass(frozen=True, kw_only=True)
class VQ(Quantised):
    """Learned codes of `latent_channels`; the default is LDM's vq-f4.

    beta: weight of the commitment term. normalize: codes of length 1, good with few latent channels (8) and many codes
    (LlamaGen). codebook_decay: 0, codes follow gradients; else moving averages, 0.99 say. revive_every: steps after
    which an unused code is given a vector of the batch; 0 never. VQGAN-f16 has channels (128, 128, 256, 256, 512),
    attention_at (16,), 1024 codes of 256. ValueError for what cannot be built.
    """

    kind: Literal["vq"] = "vq"
    latent_channels: int = 3
    codes: int = 8192
    beta: float = 0.25
    normalize: bool = False
    codebook_decay: float = 0.0
    revive_every: int = 0

    def __post_init__(self) -> None:
        self.check()
        if self.codes < 2 or not self.beta >= 0:
            raise ValueError(
                f"a codebook needs at least 2 codes and beta of at least 0, got {self.codes} and {self.beta}."
            )
        if self.normalize and self.latent_channels < 2:
            raise ValueError("codes of length 1 need at least 2 latent_channels when normalize is on.")
        if not 0 <= self.codebook_decay < 1 or self.revive_every < 0:
            raise ValueError(
                "codebook_decay must lie in [0, 1) and revive_every must be at least 0, "
                f"got {self.codebook_decay} and {self.revive_every}."
            )

    @property
    def code_length(self) -> int:
        """Channels of a code."""
        return self.latent_channels

    def codebook(self) -> Codebook:
        """A freshly initialised codebook of learned codes."""
        return Quantizer(
            self.codes,
            self.latent_channels,
            beta=self.beta,
            normalize=self.normalize,
            decay=self.codebook_decay,
            revive=self.revive_every,
        )


@dataclass(frozen=True, kw_only=True)
class FSQ(Quantised):
    """Finite scalar quantisation: one latent channel per entry of `levels`, whose product is the number of codes.

    Mentzer et al. 2023, table 1: (8, 6, 5) for about 2^8 codes, (8, 5, 5, 5) 2^10, (7, 5, 5, 5, 5) 2^12,
    (8, 8, 8, 6, 5) 2^14, (8, 8, 8, 5, 5, 5) 2^16. ValueError for what cannot be built.
    """

    kind: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = (8, 8, 8, 6, 5)

    def __post_init__(self) -> None:
        self.check()
        if min(self.levels) < 3:
            raise ValueError(f"finite scalar quantisation needs levels of at least 3, got {self.levels}.")

    @property
    def code_length(self) -> int:
        """Channels of a code: one a level."""
        return len(self.levels)

    def codebook(self) -> Codebook:
        """The grid of these levels; nothing in it learns."""
        return FiniteScalar(self.levels)


@dataclass(frozen=True, kw_only=True)
class LFQ(Quantised):
    """Lookup-free quantisation: 2^latent_channels codes of signs.

    beta: weight of the commitment term; entropy and temperature as in `LookupFree`. Above 20 channels the entropy of
    the codes in use does not fit in memory: entropy must be 0. ValueError for what cannot be built.
    """

    kind: Literal["lfq"] = "lfq"
    latent_channels: int = 12
    beta: float = 0.25
    entropy: float = 0.1
    temperature: float = 0.01

    def __post_init__(self) -> None:
        self.check()
        if not (min(self.beta, self.entropy) >= 0 and self.temperature > 0):
            raise ValueError("lookup-free quantisation needs beta and entropy of at least 0 and a temperature above 0.")
        if self.latent_channels > (20 if self.entropy else 30):
            raise ValueError(f"{self.latent_channels} bits are too many codes: 20 at most, 30 where entropy is 0.")

    @property
    def code_length(self) -> int:
        """Channels of a code: its bits."""
        return self.latent_channels

    def codebook(self) -> Codebook:
        """The signs of as many channels; nothing in it learns."""
        return LookupFree(self.latent_channels, beta=self.beta, entropy=self.entropy, temperature=self.temperature)


class VQAutoencoder(WithoutPosterior):
    """Encoder, codebook, decoder; moments are z before quantisation. Keys as diffusers' VQModel, and `norm`.

    `decode` quantises, so stage two models z as it is, under one scalar scale. `regularisation` reads the codebook
    outside `forward`: its gradient must be in the same backward pass as the reconstruction's.
    """

    encoder_parts = ("encoder.", "quant_conv.")
    quantize: Codebook

    def __init__(self, config: Quantised) -> None:
        super().__init__()
        self.factor = config.factor
        self.image_channels, self.latent_channels = config.image_channels, config.code_length
        network = (config.channels, config.blocks, config.groups, config.mid_attention, config.attention_at)
        self.encoder = Encoder(config.image_channels, config.encoder_channels, *network)
        self.decoder = Decoder(config.image_channels, config.encoder_channels, *network)
        self.quant_conv = nn.Conv2d(config.encoder_channels, config.code_length, 1)
        self.quantize = config.codebook()
        self.post_quant_conv = nn.Conv2d(config.code_length, config.encoder_channels, 1)
        self.norm = LatentNorm(config.code_length, gaussian=False, shared=True)
        save_memory(self, config.gradient_checkpointing)

    def encode(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) in [-1, 1] -> z before quantisation (B, code_length, h, w) float32."""
        self.check_images(images)
        z = full_precision(self.quant_conv(self.encoder(images.to(self.last_layer.dtype))))
        return self.quantize.prepare(z)

    def _decode(self, z: Tensor) -> Tensor:
        return full_precision(self.decoder(self.post_quant_conv(self.quantize(z).to(self.last_layer.dtype))))

    def regularisation(self, moments: Tensor, reduce: Reduce = identity) -> Tensor:
        """The codebook's terms of each image (B,)."""
        return self.quantize.terms(moments, reduce)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the last convolution, where the balance takes its gradients."""
        return self.decoder.conv_out.weight
