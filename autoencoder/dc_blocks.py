"""What the deep-compression autoencoder is made of: norms, blocks with and without attention, resampling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.base import full_precision
from autoencoder.recompute import Block

HEAD, EPS = 32, 1e-5


class ChannelNorm(nn.Module):
    """x / rms over channels · weight + bias: (B, C, H, W), statistics in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape and type; the mean square is taken in float32."""
        rms = (x.float().square().mean(1, keepdim=True) + EPS).rsqrt()
        return (x * rms).to(x.dtype) * self.weight[:, None, None] + self.bias[:, None, None]


class FixedBatchNorm(nn.Module):
    """(x − running_mean) / √(running_var + 1e-5) · weight + bias per channel: (B, C, H, W), keys as nn.BatchNorm2d.

    In training too: the statistics are those of a published model and stay, so that no sample's gradient depends on
    the others of its micro-batch. Freshly built they are 0 and 1, a scale and shift alone.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))  # read and written, never used

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)


class ResBlock(Block):
    """x + norm(conv(silu(conv(x)))): (B, C, H, W) -> (B, C, H, W); `batch_norm`: with that, and relu for silu."""

    def __init__(self, channels: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm: nn.Module = FixedBatchNorm(channels) if batch_norm else ChannelNorm(channels)
        self.activate = F.relu if batch_norm else F.silu

    def compute(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        y: Tensor = x + self.norm(self.conv2(self.activate(self.conv1(x))))
        return y


class Aggregation(nn.Module):
    """Queries, keys and values mixed over kernel² neighbours, then within each head: (B, 3·C, H, W) -> the same."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        width = 3 * channels
        self.proj_in = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        self.proj_out = nn.Conv2d(width, width, 1, groups=width // HEAD, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3·C, H, W) -> the same shape."""
        y: Tensor = self.proj_out(self.proj_in(x))
        return y


class LinearAttention(nn.Module):
    """Σ_j relu(q_i)·relu(k_j) v_j / Σ_j relu(q_i)·relu(k_j), cost linear in positions, with a residual.

    Of each position, and of its neighbours within each kernel of `scales`. Cai et al. 2023, EfficientViT, eq. 2 and
    section 3.1.
    """

    def __init__(self, channels: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_qkv_multiscale = nn.ModuleList([Aggregation(channels, kernel) for kernel in scales])
        self.to_out = nn.Linear((1 + len(scales)) * channels, channels, bias=False)
        self.norm_out = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        tokens = x.movedim(1, -1)
        qkv = torch.cat([self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)], -1).movedim(-1, 1)
        both = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], 1)
        with torch.autocast(x.device.type, enabled=False):  # sums over all positions
            q, k, v = full_precision(both).reshape(x.shape[0], -1, 3 * HEAD, x.shape[2] * x.shape[3]).chunk(3, 2)
            q, k = F.relu(q), F.relu(k)
            sums = F.pad(v, (0, 0, 0, 1), value=1.0) @ k.transpose(-1, -2) @ q  # the last row is the denominator
            mixed = sums[:, :, :-1] / (sums[:, :, -1:] + 1e-15)
        mixed = mixed.reshape(x.shape[0], -1, *x.shape[2:]).to(x.dtype)
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
        """x (B, C, H, W) -> the same shape."""
        a, b = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, 1)
        y: Tensor = x + self.norm(self.conv_point(a * F.silu(b)))
        return y


class AttentionBlock(Block):
    """Linear attention, then the gated convolution: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.attn, self.conv_out = LinearAttention(channels, scales), GatedConv(channels)

    def compute(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        y: Tensor = self.conv_out(self.attn(x))
        return y


def fold(x: Tensor, outputs: int) -> Tensor:
    """Channels to fewer by the mean of neighbours: (B, C, H, W) -> (B, outputs, H, W)."""
    return x.reshape(x.shape[0], outputs, -1, *x.shape[2:]).mean(2)


def spread(x: Tensor, outputs: int) -> Tensor:
    """Channels to more by repeating each: (B, C, H, W) -> (B, outputs, H, W)."""
    return x.repeat_interleave(outputs // x.shape[1], 1)


class Down(nn.Module):
    """space-to-channel(conv(x)) + fold(space-to-channel(x)): (B, C, H, W) -> (B, outputs, H/2, W/2).

    `strided`: a convolution of stride 2 in the place of space-to-channel(conv).
    """

    def __init__(self, inputs: int, outputs: int, shortcut: bool = True, *, strided: bool = False) -> None:
        super().__init__()
        self.outputs, self.shortcut, self.strided = outputs, shortcut, strided
        self.conv = nn.Conv2d(inputs, outputs if strided else outputs // 4, 3, 2 if strided else 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, inputs, H, W), sides even -> (B, outputs, H/2, W/2)."""
        y: Tensor = self.conv(x)
        y = y if self.strided else F.pixel_unshuffle(y, 2)
        return y + fold(F.pixel_unshuffle(x, 2), self.outputs) if self.shortcut else y


class Up(nn.Module):
    """channel-to-space(conv(x) + spread(x)): (B, C, H, W) -> (B, outputs, 2H, 2W).

    `repeated`: each position twice a side, then a convolution, in the place of channel-to-space(conv).
    """

    def __init__(self, inputs: int, outputs: int, shortcut: bool = True, *, repeated: bool = False) -> None:
        super().__init__()
        self.outputs, self.shortcut, self.repeated = outputs, shortcut, repeated
        self.conv = nn.Conv2d(inputs, outputs if repeated else 4 * outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, inputs, H, W) -> (B, outputs, 2H, 2W)."""
        if self.repeated:
            y: Tensor = self.conv(F.interpolate(x, scale_factor=2))
            return y + F.pixel_shuffle(spread(x, 4 * self.outputs), 2) if self.shortcut else y
        y = self.conv(x)
        return F.pixel_shuffle(y + spread(x, 4 * self.outputs) if self.shortcut else y, 2)
