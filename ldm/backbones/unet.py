"""Cross-attention U-Net of latent diffusion and Stable Diffusion, its parameters named as diffusers names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.recompute import run
from ldm.backbones.attention import GEGLU, attend, blank, key_mask, zero
from ldm.backbones.base import Backbone, BackboneConfig, need_pooled
from ldm.backbones.embed import Projection, sincos_table, sinusoid
from ldm.backbones.image import ImageInputs
from ldm.conditioning import Cond, Parts, Share

EXTENT = 32.0  # tokens that the position table covers, whatever the size


@dataclass(frozen=True, kw_only=True)
class UNet(BackboneConfig):
    """Config of a U-Net: one level per entry of `channels`, each half the size of the one before.

    `attention`: the levels (0 = full size) with text transformers; the middle always has one. `heads` per attention, or
    channels per head where `head_dim` is not 0. `depth`: transformer layers per attention. `pooled` adds pooled text to
    the time embedding. `scale_shift`: that embedding scales and shifts normalised features (ADM). `position`: a fixed
    position table joins the first features. The defaults are Stable Diffusion 1.x: 859,520,964 parameters.
    """

    small: ClassVar[Mapping[str, Any]] = {"channels": (32, 64), "attention": (0, 1), "blocks": 1, "groups": 8}
    kind: Literal["unet"] = "unet"
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2
    attention: tuple[int, ...] = (0, 1, 2)
    heads: int = 8
    head_dim: int = 0
    depth: int = 1
    linear_projection: bool = False
    pooled: bool = False
    scale_shift: bool = False
    position: bool = False
    groups: int = 32
    learned_variance: bool = False
    gradient_checkpointing: bool = False

    limits: ClassVar = {"blocks": "(0, inf)", "heads": "(0, inf)", "head_dim": "[0, inf)", "depth": "(0, inf)",
                        "groups": "(0, inf)"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.channels or min(self.channels) <= 0:
            raise ValueError(f"unet channels must be positive, with at least one level, got {self.channels}")
        if not set(self.attention) <= set(range(len(self.channels))):
            raise ValueError(f"attention names levels 0 to {len(self.channels) - 1}, not {self.attention}")
        for width in self.channels:
            if width % self.groups:
                raise ValueError(f"every entry of channels must be divisible by groups ({self.groups}); {width} is not")
        for level in {*self.attention, len(self.channels) - 1}:
            divisor = self.head_dim or self.heads
            if self.channels[level] % divisor:
                raise ValueError(f"cannot cut level {level} ({self.channels[level]} channels) into heads by {divisor}")
        if self.position and self.channels[0] % 4:
            raise ValueError(f"a position table needs channels divisible by 4 at level 0, not {self.channels[0]}")

    def heads_at(self, level: int) -> int:
        """Attention heads at a level."""
        return self.channels[level] // self.head_dim if self.head_dim else self.heads

    def build(self, *, channels: int, context_dim: int, pooled_dim: int | None = None,
              **image: Unpack[ImageInputs]) -> CrossAttentionUNet:
        return CrossAttentionUNet(self, channels, context_dim, need_pooled(self.pooled, pooled_dim)).shown(**image)


class ResnetBlock(nn.Module):
    """skip(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + linear(silu(time))))); the branch starts at zero.
    With `scale_shift` the linear layer gives (scale, shift), and norm2(h) (1 + scale) + shift goes on."""

    def __init__(self, inputs: int, outputs: int, time_dim: int, groups: int, scale_shift: bool) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-5)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, 2 * outputs if scale_shift else outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-5)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        zero(self.conv2)

    def forward(self, x: Tensor, active_time: Tensor) -> Tensor:
        """x (B, inputs, H, W), silu of the time embedding (B, time_dim) -> (B, outputs, H, W)."""
        h, time = self.conv1(F.silu(self.norm1(x))), self.time_emb_proj(active_time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + time)
        y: Tensor = self.conv_shortcut(x) + self.conv2(F.silu(h))
        return y


class Attention(nn.Module):
    """Attention of x (B, N, width) over a context (B, L, context_dim), itself where that is x."""

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, shared: Parts) -> Tensor:
        projected = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in projected)
        y: Tensor = self.to_out[0](attend(q, k, v, mask, shared))
        return y


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention to the text and a gated feed-forward, each on a normalised residual."""

    def __init__(self, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, context_dim, heads)
        # net.1 is the place of diffusers' dropout: it keeps the published key net.2
        net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, share: Share) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y, None, share.own)
        x = x + self.attn2(self.norm2(x), context, mask, share.cross)
        x = x + self.ff["net"](self.norm3(x))
        return x


class SpatialTransformer(nn.Module):
    """A residual transformer over the pixels of a feature map; it starts as the identity."""

    def __init__(self, config: UNet, width: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.linear = config.linear_projection
        self.norm = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1)
        layers = (TransformerLayer(width, context_dim, heads) for _ in range(config.depth))
        self.transformer_blocks = nn.ModuleList(layers)
        self.proj_out = nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1)
        zero(self.proj_out)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, share: Share) -> Tensor:
        """x (B, width, H, W), context (B, L, context_dim), mask (B, 1, 1, L) -> (B, width, H, W)."""
        tokens = _pointwise(self.proj_in, self.norm(x).flatten(2).transpose(1, 2))
        for layer in self.transformer_blocks:
            tokens = layer(tokens, context, mask, share)
        return x + _pointwise(self.proj_out, tokens).transpose(1, 2).reshape(x.shape)


def _pointwise(layer: nn.Module, tokens: Tensor) -> Tensor:
    """A linear layer, or the same thing stored as a 1x1 convolution, on tokens (B, N, D)."""
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    return F.linear(tokens, weight.flatten(1), bias)


class Resample(nn.Module):
    """Halves the size (strided convolution) or doubles it (nearest neighbour, then convolution)."""

    def __init__(self, width: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)
        return y


class Stage(nn.Module):
    """Resnets of one level, each followed by a text transformer where the level has them; `place` in the U-Net."""

    def __init__(self, config: UNet, level: int, inputs: Sequence[int], context_dim: int, transformers: int,
                 place: int) -> None:
        super().__init__()
        self.depth = place / (2 * len(config.channels) + 1)
        self.saving, width, time_dim = config.gradient_checkpointing, config.channels[level], 4 * config.channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, width, time_dim, config.groups, config.scale_shift) for channels in inputs)
        self.attentions = nn.ModuleList(
            SpatialTransformer(config, width, context_dim, config.heads_at(level)) for _ in range(transformers))

    def step(self, j: int, x: Tensor, given: Given) -> Tensor:
        """Resnet j, then transformer j if there is one."""
        x = run(self.resnets[j], self.saving, x, given.active_time)
        if j >= len(self.attentions):
            return x
        return run(self.attentions[j], self.saving, x, given.context, given.mask, given.share.at(self.depth))


class Given(NamedTuple):
    """What all layers read: silu of the time embedding (B, T), text (B, L, D), its mask (B, 1, 1, L), `Cond.share`."""

    active_time: Tensor
    context: Tensor
    mask: Tensor | None
    share: Share


class DownBlock(Stage):
    """A level of the way down: x -> every feature map the way up will take in, the last of them to go on with."""

    def __init__(self, config: UNet, level: int, context_dim: int) -> None:
        widths, width, blocks = config.channels, config.channels[level], config.blocks
        inputs = [widths[max(level - 1, 0)], *[width] * (blocks - 1)]
        super().__init__(config, level, inputs, context_dim, blocks if level in config.attention else 0, level)
        self.downsamplers = nn.ModuleList([Resample(width, up=False)] if level < len(widths) - 1 else [])

    def forward(self, x: Tensor, given: Given) -> list[Tensor]:
        kept = []
        for j in range(len(self.resnets)):
            x = self.step(j, x, given)
            kept.append(x)
        return kept + [downsample(x) for downsample in self.downsamplers]


class MiddleBlock(Stage):
    """Resnet, text transformer, resnet at the smallest size."""

    def forward(self, x: Tensor, given: Given) -> Tensor:
        return self.step(1, self.step(0, x, given), given)


class UpBlock(Stage):
    """A level of the way up: every resnet takes in, from the end of `kept`, one feature map of the way down."""

    def __init__(self, config: UNet, level: int, context_dim: int) -> None:
        widths, width, blocks = config.channels, config.channels[level], config.blocks
        below, above = widths[min(level + 1, len(widths) - 1)], widths[max(level - 1, 0)]
        transformers = blocks + 1 if level in config.attention else 0
        inputs = [below + width, *[2 * width] * (blocks - 1), width + above]
        super().__init__(config, level, inputs, context_dim, transformers, 2 * len(widths) - level)
        self.upsamplers = nn.ModuleList([Resample(width, up=True)] if level else [])

    def forward(self, x: Tensor, kept: list[Tensor], given: Given) -> Tensor:
        for j in range(len(self.resnets)):
            x = self.step(j, torch.cat([x, kept.pop()], dim=1), given)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class CrossAttentionUNet(Backbone):
    """U-Net of latent diffusion (Rombach et al. 2022), its text read by cross-attention.

    Output exactly 0 at initialisation, as in ADM (Dhariwal & Nichol 2021). Sizes: multiples of 2^(levels - 1).
    """

    shares = frozenset({"own", "cross"})

    def __init__(self, config: UNet, channels: int, context_dim: int, pooled_dim: int) -> None:
        out_channels = channels * (2 if config.learned_variance else 1)
        widths = config.channels
        super().__init__(channels=channels, out_channels=out_channels, multiple=2 ** (len(widths) - 1))
        self.config, time_dim = config, 4 * widths[0]
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.time_embedding = Projection(widths[0], time_dim)
        self.class_embedding = Projection(pooled_dim, time_dim) if config.pooled else None
        levels = range(len(widths))
        self.down_blocks = nn.ModuleList(DownBlock(config, level, context_dim) for level in levels)
        self.mid_block = MiddleBlock(config, levels[-1], [widths[-1]] * 2, context_dim, 1, place=len(widths))
        self.up_blocks = nn.ModuleList(UpBlock(config, level, context_dim) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        zero(self.conv_out)

    def predict(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """See `Backbone.predict`."""
        time = self.embedded(self.time_embedding(sinusoid(noise_level, self.config.channels[0])), cond)
        if self.class_embedding is not None and cond.pooled is not None:
            time = time + self.class_embedding(cond.pooled)
        given = Given(F.silu(time), blank(cond.context, cond.mask), key_mask(cond.mask), cond.share)
        x = self.conv_in(x)
        if self.config.position:
            table = sincos_table(x.shape[1], x.shape[2], x.shape[3], EXTENT, x.device)
            x = x + table.T.reshape(x.shape[1:]).to(x.dtype)
        kept = [x]
        for down in self.down_blocks:
            kept += down(kept[-1], given)
        x = self.mid_block(kept[-1], given)
        for up in self.up_blocks:
            x = up(x, kept, given)
        y: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return y


BACKBONES = (UNet,)
