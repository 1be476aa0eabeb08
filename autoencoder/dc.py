"""The deep-compression autoencoder (Chen et al. 2024, DC-AE): factor 32 and beyond by residual space-to-channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.base import Unregularised
from autoencoder.dc_blocks import HEAD, AttentionBlock, ChannelNorm, Down, ResBlock, Up, fold, spread
from autoencoder.norm import LatentNorm
from autoencoder.recompute import save_memory


@dataclass(frozen=True, kw_only=True)
class DC:
    """Shape of a deep-compression autoencoder of factor 2^(len(channels) - 1); the default is f32 with 32 channels.

    encoder_blocks, decoder_blocks: blocks per level, finest first; 0 in the first halves the image at once.
    attention_at: downsampling factors of the levels whose blocks are linear attention instead of convolutions, for
    which their channels must be divisible by 32; scales: the kernels over which it sees neighbours too. resample:
    "shuffle" moves space to channels and back around a convolution, "conv" convolves with stride 2 and after repetition
    (Xie et al. 2024, Sana). batch_norm_at: factors of decoder levels with the fixed batch norm and ReLU of the models
    published for ImageNet. gradient_checkpointing as in KL. ValueError for what cannot be built.
    """

    kind: Literal["dc"] = "dc"
    channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_blocks: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    latent_channels: int = 32
    image_channels: int = 3
    attention_at: tuple[int, ...] = (8, 16, 32)
    scales: tuple[int, ...] = (5,)
    resample: Literal["shuffle", "conv"] = "shuffle"
    batch_norm_at: tuple[int, ...] = ()
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        levels = len(self.channels)
        if levels < 2 or {len(self.encoder_blocks), len(self.decoder_blocks)} != {levels}:
            raise ValueError("a deep-compression autoencoder needs two levels or more, each with its blocks.")
        if min(*self.channels, self.latent_channels, self.image_channels) < 1:
            raise ValueError("channels, latent_channels and image_channels must be at least 1.")
        for blocks in (self.encoder_blocks, self.decoder_blocks):
            if blocks[0] < 0 or min(blocks[1:]) < 1:
                raise ValueError(f"each level but the first needs at least 1 block, got {blocks}.")
        for fine, coarse in zip(self.channels, self.channels[1:], strict=False):
            if coarse % 4 or 4 * fine % coarse:
                raise ValueError(f"a shortcut from {fine} to {coarse} channels needs {coarse} to divide {4 * fine}.")
        if self.channels[-1] % self.latent_channels:
            raise ValueError(f"latent_channels {self.latent_channels} must divide the last channels.")
        at = {2**i: width for i, width in enumerate(self.channels)}
        if not set(self.attention_at) <= set(at) or any(at[factor] % HEAD for factor in self.attention_at):
            raise ValueError(f"attention_at {self.attention_at} must name factors of {tuple(at)} of 32·n channels.")
        if not set(self.batch_norm_at) <= set(at) - set(self.attention_at):
            raise ValueError(f"batch_norm_at {self.batch_norm_at} must name factors of levels without attention.")
        if any(kernel < 1 or not kernel % 2 for kernel in self.scales):
            raise ValueError(f"scales must be odd kernel sizes, got {self.scales}.")

    @property
    def factor(self) -> int:
        """Image size over latent size."""
        return 1 << (len(self.channels) - 1)

    def build(self) -> DCAutoencoder:
        """A freshly initialised model (torch's default initialisation, seeded by the caller)."""
        return DCAutoencoder(self)


def _level(config: DC, i: int, blocks: int, batch_norm_at: tuple[int, ...] = ()) -> list[nn.Module]:
    if 2**i in config.attention_at:
        return [AttentionBlock(config.channels[i], config.scales) for _ in range(blocks)]
    return [ResBlock(config.channels[i], 2**i in batch_norm_at) for _ in range(blocks)]


class DCEncoder(nn.Module):
    """images -> z (B, latent_channels, H/f, W/f)."""

    def __init__(self, config: DC) -> None:
        super().__init__()
        widths, blocks = config.channels, config.encoder_blocks
        self.outputs, by_convolution = config.latent_channels, config.resample == "conv"
        self.conv_in: nn.Module = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        if not blocks[0]:
            self.conv_in = Down(config.image_channels, widths[1], shortcut=False, strided=by_convolution)
        self.down_blocks = nn.ModuleList()
        for i, count in enumerate(blocks):
            level = _level(config, i, count)
            if count and i < len(widths) - 1:
                level.append(Down(widths[i], widths[i + 1], strided=by_convolution))
            self.down_blocks.append(nn.Sequential(*level))
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, image_channels, H, W), sides divisible by f -> z (B, latent_channels, H/f, W/f)."""
        h = self.conv_in(images)
        for level in self.down_blocks:
            h = level(h)
        y: Tensor = self.conv_out(h) + fold(h, self.outputs)
        return y


class DCDecoder(nn.Module):
    """z -> images (B, image_channels, f·h, f·w)."""

    def __init__(self, config: DC) -> None:
        super().__init__()
        widths, blocks = config.channels, config.decoder_blocks
        self.inputs, by_convolution = widths[-1], config.resample == "conv"
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()  # finest first, walked from the last
        for i, count in enumerate(blocks):
            up = [Up(widths[i + 1], widths[i], repeated=by_convolution)] if count and i < len(widths) - 1 else []
            self.up_blocks.append(nn.Sequential(*up, *_level(config, i, count, config.batch_norm_at)))
        last = widths[0] if blocks[0] else widths[1]
        self.norm_out = ChannelNorm(last)
        self.conv_out: nn.Module = nn.Conv2d(last, config.image_channels, 3, padding=1)
        if not blocks[0]:
            self.conv_out = Up(last, config.image_channels, shortcut=False, repeated=by_convolution)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, latent_channels, h, w) -> images (B, image_channels, f·h, f·w)."""
        h = self.conv_in(z) + spread(z, self.inputs)
        for level in reversed(self.up_blocks):
            h = level(h)
        images: Tensor = self.conv_out(F.relu(self.norm_out(h)))
        return images


class DCAutoencoder(Unregularised):
    """Encoder and decoder without a posterior: moments are z. Keys as diffusers' AutoencoderDC, and `norm`."""

    decoder: DCDecoder

    def __init__(self, config: DC) -> None:
        super().__init__()
        self.factor = config.factor
        self.image_channels, self.latent_channels = config.image_channels, config.latent_channels
        self.encoder, self.decoder = DCEncoder(config), DCDecoder(config)
        self.norm = LatentNorm(config.latent_channels, gaussian=False)
        save_memory(self, config.gradient_checkpointing)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the last convolution, where the balance takes its gradients."""
        last = self.decoder.conv_out
        return last.conv.weight if isinstance(last, Up) else last.weight  # type: ignore[return-value]
