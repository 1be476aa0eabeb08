"""The deep-compression autoencoder (Chen et al. 2024, DC-AE): factor 32 and beyond by residual space-to-channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.base import Unregularised, full_precision
from autoencoder.norm import LatentNorm

HEAD, EPS = 32, 1e-5


@dataclass(frozen=True, kw_only=True)
class DC:
    """Shape of a deep-compression autoencoder of factor 2^(len(channels) - 1); the default is f32 with 32 channels.

    encoder_blocks, decoder_blocks: blocks per level, finest first; 0 in the first halves the image at once.
    attention_at: downsampling factors of the levels whose blocks are linear attention instead of convolutions, for
    which their channels must be divisible by 32. ValueError for what cannot be built.
    """

    kind: Literal["dc"] = "dc"
    channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_blocks: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    latent_channels: int = 32
    image_channels: int = 3
    attention_at: tuple[int, ...] = (8, 16, 32)

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

    @property
    def factor(self) -> int:
        """Image size over latent size."""
        return 1 << (len(self.channels) - 1)

    def build(self) -> DCAutoencoder:
        """A freshly initialised model (torch's default initialisation, seeded by the caller)."""
        return DCAutoencoder(self)


class ChannelNorm(nn.Module):
    """x / rms over channels · weight + bias: (B, C, H, W), statistics in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        rms = (x.float().square().mean(1, keepdim=True) + EPS).rsqrt()
        return (x * rms).to(x.dtype) * self.weight[:, None, None] + self.bias[:, None, None]


class ResBlock(nn.Module):
    """x + norm(conv(silu(conv(x)))): (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.norm(self.conv2(F.silu(self.conv1(x))))
        return y


class Aggregation(nn.Module):
    """Queries, keys and values mixed over 5x5 neighbours, then within each head: (B, 3·C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(3 * channels, 3 * channels, 5, padding=2, groups=3 * channels, bias=False)
        self.proj_out = nn.Conv2d(3 * channels, 3 * channels, 1, groups=3 * channels // HEAD, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj_out(self.proj_in(x))
        return y


class LinearAttention(nn.Module):
    """Σ_j relu(q_i)·relu(k_j) v_j / Σ_j relu(q_i)·relu(k_j), at two scales, cost linear in positions, with a residual.

    Cai et al. 2023, EfficientViT, eq. 2 and section 3.1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_qkv_multiscale = nn.ModuleList([Aggregation(channels)])
        self.to_out = nn.Linear(2 * channels, channels, bias=False)
        self.norm_out = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.movedim(1, -1)
        qkv = torch.cat([self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)], -1).movedim(-1, 1)
        both = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], 1)
        with torch.autocast(x.device.type, enabled=False):  # sums over all positions
            q, k, v = full_precision(both).reshape(len(x), -1, 3 * HEAD, x.shape[2] * x.shape[3]).chunk(3, 2)
            q, k = F.relu(q), F.relu(k)
            sums = F.pad(v, (0, 0, 0, 1), value=1.0) @ k.transpose(-1, -2) @ q  # the last row is the denominator
            mixed = sums[:, :, :-1] / (sums[:, :, -1:] + 1e-15)
        mixed = mixed.reshape(len(x), -1, *x.shape[2:]).to(x.dtype)
        y: Tensor = x + self.norm_out(self.to_out(mixed.movedim(1, -1)).movedim(-1, 1))
        return y


class GatedConv(nn.Module):
    """x + norm(conv(a·silu(b))), a and b from a depthwise convolution of eight times the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_inverted = nn.Conv2d(channels, 8 * channels, 1)
        self.conv_depth = nn.Conv2d(8 * channels, 8 * channels, 3, padding=1, groups=8 * channels)
        self.conv_point = nn.Conv2d(4 * channels, channels, 1, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, 1)
        y: Tensor = x + self.norm(self.conv_point(a * F.silu(b)))
        return y


class AttentionBlock(nn.Module):
    """Linear attention, then the gated convolution: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn, self.conv_out = LinearAttention(channels), GatedConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv_out(self.attn(x))
        return y


def fold(x: Tensor, outputs: int) -> Tensor:
    """Channels to fewer by the mean of neighbours: (B, C, H, W) -> (B, outputs, H, W)."""
    return x.reshape(len(x), outputs, -1, *x.shape[2:]).mean(2)


def spread(x: Tensor, outputs: int) -> Tensor:
    """Channels to more by repeating each: (B, C, H, W) -> (B, outputs, H, W)."""
    return x.repeat_interleave(outputs // x.shape[1], 1)


class Down(nn.Module):
    """space-to-channel(conv(x)) + fold(space-to-channel(x)): (B, C, H, W) -> (B, outputs, H/2, W/2)."""

    def __init__(self, inputs: int, outputs: int, shortcut: bool = True) -> None:
        super().__init__()
        self.outputs, self.shortcut = outputs, shortcut
        self.conv = nn.Conv2d(inputs, outputs // 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_unshuffle(self.conv(x), 2)
        return y + fold(F.pixel_unshuffle(x, 2), self.outputs) if self.shortcut else y


class Up(nn.Module):
    """channel-to-space(conv(x) + spread(x)): (B, C, H, W) -> (B, outputs, 2H, 2W)."""

    def __init__(self, inputs: int, outputs: int, shortcut: bool = True) -> None:
        super().__init__()
        self.outputs, self.shortcut = outputs, shortcut
        self.conv = nn.Conv2d(inputs, 4 * outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.pixel_shuffle(y + spread(x, 4 * self.outputs) if self.shortcut else y, 2)


def _level(config: DC, i: int, blocks: int) -> list[nn.Module]:
    kind = AttentionBlock if 2**i in config.attention_at else ResBlock
    return [kind(config.channels[i]) for _ in range(blocks)]


class DCEncoder(nn.Module):
    """images -> z (B, latent_channels, H/f, W/f)."""

    def __init__(self, config: DC) -> None:
        super().__init__()
        widths, blocks = config.channels, config.encoder_blocks
        self.outputs = config.latent_channels
        self.conv_in: nn.Module = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        if not blocks[0]:
            self.conv_in = Down(config.image_channels, widths[1], shortcut=False)
        self.down_blocks = nn.ModuleList()
        for i, count in enumerate(blocks):
            level = _level(config, i, count)
            if count and i < len(widths) - 1:
                level.append(Down(widths[i], widths[i + 1]))
            self.down_blocks.append(nn.Sequential(*level))
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
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
        self.inputs = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()  # finest first, walked from the last
        for i, count in enumerate(blocks):
            up = [Up(widths[i + 1], widths[i])] if count and i < len(widths) - 1 else []
            self.up_blocks.append(nn.Sequential(*up, *_level(config, i, count)))
        last = widths[0] if blocks[0] else widths[1]
        self.norm_out = ChannelNorm(last)
        self.conv_out: nn.Module = nn.Conv2d(last, config.image_channels, 3, padding=1)
        if not blocks[0]:
            self.conv_out = Up(last, config.image_channels, shortcut=False)

    def forward(self, z: Tensor) -> Tensor:
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

    @property
    def last_layer(self) -> Tensor:
        last = self.decoder.conv_out
        return last.conv.weight if isinstance(last, Up) else last.weight  # type: ignore[return-value]
