"""Cross-attention U-Net of latent diffusion and Stable Diffusion, its parameters named as diffusers names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.recompute import run
from ldm.backbones.attention import blank, key_mask, zero
from ldm.backbones.base import Backbone, BackboneConfig, need_pooled
from ldm.backbones.embed import Projection, sincos_table, sinusoid
from ldm.backbones.image import ImageInputs, LevelEmbedding, SizeEmbedding, Widened, with_level, with_numbers, with_size
from ldm.backbones.unet_blocks import EXTENT, Given, Resample, ResnetBlock, SpatialTransformer
from ldm.conditioning import Cond


@dataclass(frozen=True, kw_only=True)
class UNet(BackboneConfig):
    """Config of a U-Net: one level per entry of `channels`, each half the size of the one before.

    `attention`: the levels (0 = full size) with text transformers; the middle always has one. `heads` per attention, or
    channels per head where `head_dim` is not 0. `depth`: transformer layers per attention. `pooled` adds pooled text to
    the time embedding. `scale_shift`: that embedding scales and shifts normalised features (ADM). `position`: a fixed
    position table joins the first features. `query_position`: one joins every query of the text too, as DETR's do
    (Carion et al. 2020, fig. 10), so that places ask for their own words from the first steps. The defaults are Stable
    Diffusion 1.x: 859,520,964 parameters.
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
    query_position: bool = False
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
        asking = {*self.attention, len(self.channels) - 1}
        for level in asking:
            divisor = self.head_dim or self.heads
            if self.channels[level] % divisor:
                raise ValueError(f"cannot cut level {level} ({self.channels[level]} channels) into heads by {divisor}")
        tabled = ({0} if self.position else set()) | (asking if self.query_position else set())
        for level in sorted(tabled):
            if self.channels[level] % 4:
                raise ValueError(f"a position table needs channels divisible by 4 at level {level}, "
                                 f"not {self.channels[level]}")

    def heads_at(self, level: int) -> int:
        """Attention heads at a level."""
        return self.channels[level] // self.head_dim if self.head_dim else self.heads

    def build(self, *, channels: int, context_dim: int, pooled_dim: int | None = None,
              **image: Unpack[ImageInputs]) -> CrossAttentionUNet:
        return CrossAttentionUNet(self, channels, context_dim, need_pooled(self.pooled, pooled_dim)).shown(**image)


class Stage(nn.Module):
    """Resnets of one level, each followed by a text transformer where the level has them; `place` in the U-Net."""

    def __init__(self, config: UNet, level: int, inputs: Sequence[int], context_dim: int, transformers: int,
                 place: int) -> None:
        super().__init__()
        self.depth = place / (2 * len(config.channels) + 1)
        self.saving, width, time_dim = config.gradient_checkpointing, config.channels[level], 4 * config.channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, width, time_dim, config.groups, config.scale_shift) for channels in inputs)
        made = (context_dim, config.heads_at(level), config.depth, config.groups, config.linear_projection,
                config.query_position)
        self.attentions = nn.ModuleList(SpatialTransformer(width, *made) for _ in range(transformers))

    def step(self, j: int, x: Tensor, given: Given) -> Tensor:
        """Resnet j, then transformer j if there is one."""
        x = run(self.resnets[j], self.saving, x, given.active_time)
        if j >= len(self.attentions):
            return x
        return run(self.attentions[j], self.saving, x, given.context, given.mask, given.share.at(self.depth))


class DownBlock(Stage):
    """A level of the way down: x -> every feature map the way up will take in, the last of them to go on with. A
    residual is added to what its last layer gives, before the size is halved."""

    def __init__(self, config: UNet, level: int, context_dim: int) -> None:
        widths, width, blocks = config.channels, config.channels[level], config.blocks
        inputs = [widths[max(level - 1, 0)], *[width] * (blocks - 1)]
        super().__init__(config, level, inputs, context_dim, blocks if level in config.attention else 0, level)
        self.downsamplers = nn.ModuleList([Resample(width, up=False)] if level < len(widths) - 1 else [])

    def forward(self, x: Tensor, given: Given, residual: Tensor | None = None) -> list[Tensor]:
        kept = []
        for j in range(len(self.resnets)):
            x = self.step(j, x, given)
            kept.append(x)
        if residual is not None:
            x = kept[-1] = x + residual
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


class WayDown(nn.Module):
    """The first half of a U-Net, whose `PARTS` are its modules: the features at full size, all levels, the middle."""

    PARTS: ClassVar = (
        "conv_in", "time_embedding", "level_embedding", "number_embeddings", "size_embedding", "class_embedding",
        "down_blocks", "mid_block")
    conv_in: nn.Conv2d | Widened
    time_embedding: Projection
    level_embedding: LevelEmbedding | None
    number_embeddings: nn.ModuleDict | None
    size_embedding: SizeEmbedding | None
    class_embedding: Projection | None
    down_blocks: nn.ModuleList
    mid_block: MiddleBlock
    position: bool

    def down(self, x: Tensor, noise_level: Tensor, cond: Cond, first: Tensor | None = None,
             residuals: Sequence[Tensor | None] = ()) -> tuple[list[Tensor], Given]:
        """Every feature map that `up` takes in, from the first features to the middle's; and what all layers read.

        `first` is added to the first features, `residuals` to what each level gives, before its size is halved.
        """
        time = self.time_embedding(sinusoid(noise_level, self.conv_in.out_channels))
        time = with_level(time, self.level_embedding, cond)
        time = with_size(with_numbers(time, self.number_embeddings, cond), self.size_embedding, cond, x)
        if self.class_embedding is not None and cond.pooled is not None:
            time = time + self.class_embedding(cond.pooled)
        given = Given(F.silu(time), blank(cond.context, cond.mask), key_mask(cond.mask), cond.share)
        x = self.conv_in(x)
        if self.position:
            table = sincos_table(x.shape[1], x.shape[2], x.shape[3], EXTENT, x.device)
            x = x + table.T.reshape(x.shape[1:]).to(x.dtype)
        kept = [x if first is None else x + first]
        for down, residual in zip(self.down_blocks, residuals or [None] * len(self.down_blocks), strict=True):
            kept += down(kept[-1], given, residual)
        return [*kept, self.mid_block(kept[-1], given)], given


class CrossAttentionUNet(Backbone, WayDown):
    """U-Net of latent diffusion (Rombach et al. 2022), its text read by cross-attention.

    Output exactly 0 at initialisation, as in ADM (Dhariwal & Nichol 2021). Sizes: multiples of 2^(levels - 1).
    """

    shares = frozenset({"own", "cross"})

    def __init__(self, config: UNet, channels: int, context_dim: int, pooled_dim: int) -> None:
        out_channels = channels * (2 if config.learned_variance else 1)
        widths = config.channels
        super().__init__(channels=channels, out_channels=out_channels, multiple=2 ** (len(widths) - 1))
        self.config, self.position, time_dim = config, config.position, 4 * widths[0]
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

    def units(self) -> list[nn.Module]:
        """Resnets and text transformers."""
        return [part for part in self.modules() if isinstance(part, ResnetBlock | SpatialTransformer)]

    def predict(self, x: Tensor, noise_level: Tensor, cond: Cond, levels: Sequence[Tensor] = (),
                kept: Sequence[Tensor] = ()) -> Tensor:
        """See `Backbone.predict`. Residuals: of `levels` on the way `down`, of `kept` for what `up` takes in."""
        maps, given = self.down(x, noise_level, cond, residuals=levels)
        return self.up([y + residual for y, residual in zip(maps, kept, strict=True)] if kept else maps, given)

    def tap_width(self, share: float) -> int:
        """See `Backbone.tap_width`: the middle's, whatever the share."""
        return self.config.channels[-1]

    def tapped(self, x: Tensor, noise_level: Tensor, cond: Cond, share: float) -> tuple[Tensor, Tensor]:
        """See `Backbone.tapped`."""
        maps, given = self.down(x, noise_level, cond)
        return self.up(maps, given), maps[-1].flatten(2).transpose(1, 2)

    def up(self, kept: list[Tensor], given: Given) -> Tensor:
        """The prediction, of all feature maps of the way down."""
        *kept, x = kept
        for up in self.up_blocks:
            x = up(x, kept, given)
        y: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return y


BACKBONES = (UNet,)
