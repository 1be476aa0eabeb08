"""Convolutional blocks of the LDM autoencoder family, named so that the keys are those of diffusers' AutoencoderKL."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.recompute import Block

EPS = 1e-6


def check_network(channels: tuple[int, ...], blocks: int, groups: int, attention_at: tuple[int, ...]) -> None:
    """ValueError, in one sentence with the nearest valid values, unless an encoder and a decoder can be built."""
    if not channels or min(channels) < 1 or blocks < 1 or groups < 1:
        raise ValueError("an autoencoder needs at least one level, and channels, blocks and groups of at least 1.")
    for width in channels:
        if width % groups:
            low, high = width // groups * groups, (width // groups + 1) * groups
            near = f"{low} or {high}" if low else f"{high}"
            raise ValueError(f"channels {width} must be divisible by groups {groups}: take {near}, or other groups.")
    factors = tuple(2**i for i in range(len(channels)))
    if not set(attention_at) <= set(factors):
        raise ValueError(f"attention_at {attention_at} names downsampling factors, and this network's are {factors}.")


class ResidualBlock(Block):
    """x + conv(silu(norm(conv(silu(norm(x)))))): (B, inputs, H, W) -> (B, outputs, H, W), 1x1 shortcut if need be."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def compute(self, x: Tensor) -> Tensor:
        """x (B, inputs, H, W) -> (B, outputs, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        y: Tensor = self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return y


class Attention(Block):
    """Single-head self-attention over positions with a residual: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def compute(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1 head, H·W, C)
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        y: Tensor = self.to_out[0](mixed.squeeze(1))
        return x + y.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """Halve an even size by a stride-2 convolution padded right and bottom: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W), sides even -> (B, C, H/2, W/2)."""
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return y


class Upsample(nn.Module):
    """Double the size by nearest neighbour and a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W).

    Both steps are one transposed convolution of stride 2 whose 4x4 kernel is the 3x3 kernel repeated at its four shifts
    and summed: the same numbers with 4/9 of the multiplications and without the doubled map in memory. Where that map
    is smaller than the 4x4 kernels (many channels, few cells) they are two.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        axis = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])  # where each of three taps falls, of four
        self.shifts: Tensor
        self.register_buffer("shifts", torch.kron(axis, axis).flip(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, 2H, 2W)."""
        batch, channels, height, width = x.shape
        if batch * height * width < 4 * channels:
            doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            return doubled
        taps = self.conv.weight.flatten(2) @ self.shifts.to(self.conv.weight.dtype)
        kernel = taps.view(channels, channels, 4, 4).transpose(0, 1)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """Residual blocks of one resolution, with attention after each if asked for, then a change of size if appended."""

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int, attention: bool) -> None:
        super().__init__()
        widths = (inputs,) + (outputs,) * blocks
        self.resnets = nn.ModuleList(ResidualBlock(widths[j], widths[j + 1], groups) for j in range(blocks))
        self.attentions = nn.ModuleList(Attention(outputs, groups) for _ in range(blocks if attention else 0))
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, inputs, H, W) -> (B, outputs, H', W'), sides changed where a change of size is appended."""
        for j, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[j](x)
        for resize in (*self.downsamplers, *self.upsamplers):
            x = resize(x)
        return x


class Middle(nn.Module):
    """Residual block, attention if asked for, residual block, all of one width: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        y: Tensor = self.resnets[1](x)
        return y


class Encoder(nn.Module):
    """images (B, image_channels, H, W) -> (B, outputs, H/f, W/f) with f = 2^(len(channels) - 1).

    `attention_at` holds the downsampling factors (1, 2, 4, ...) of the levels that have attention. LDM, appendix E.
    """

    def __init__(
        self, image_channels: int, outputs: int, channels: tuple[int, ...], blocks: int, groups: int,
        mid_attention: bool, attention_at: tuple[int, ...],
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv_in = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            level = Level(channels[max(i - 1, 0)], width, blocks, groups, 2**i in attention_at)
            if i < len(channels) - 1:
                level.downsamplers.append(Downsample(width))
            self.down_blocks.append(level)
        self.mid_block = Middle(channels[-1], groups, mid_attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], outputs, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, image_channels, H, W), sides divisible by f -> (B, outputs, H/f, W/f)."""
        h = self.conv_in(images)
        for level in self.down_blocks:
            h = level(h)
        y: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))
        return y


class Decoder(nn.Module):
    """(B, inputs, h, w) -> images (B, image_channels, f·h, f·w): the encoder mirrored, one more block per level."""

    def __init__(
        self, image_channels: int, inputs: int, channels: tuple[int, ...], blocks: int, groups: int,
        mid_attention: bool, attention_at: tuple[int, ...],
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, channels[-1], 3, padding=1)
        self.mid_block = Middle(channels[-1], groups, mid_attention)
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(channels))):
            above = channels[min(i + 1, len(channels) - 1)]
            level = Level(above, channels[i], blocks + 1, groups, 2**i in attention_at)
            if i > 0:
                level.upsamplers.append(Upsample(channels[i]))
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps=EPS)
        self.conv_out = nn.Conv2d(channels[0], image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, inputs, h, w) -> images (B, image_channels, f·h, f·w)."""
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        images: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return images
