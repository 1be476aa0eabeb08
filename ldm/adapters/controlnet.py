"""ControlNet: a trainable copy of a backbone's first half, which reads a hint and speaks through zero layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.controlled import Control, ControlConfig, Steerable
from ldm.backbones.attention import zero
from ldm.backbones.dit import DiffusionTransformer
from ldm.backbones.unet import CrossAttentionUNet, WayDown
from ldm.conditioning import Cond

HINT_WIDTHS = (16, 32, 96, 256)  # of the hint network, at full size and after each halving


@dataclass(frozen=True, kw_only=True)
class ControlNet(ControlConfig):
    """Config of a ControlNet: on a U-Net a copy of its way down and middle (Zhang et al. 2023, arXiv 2302.05543), on a
    DiT of its first `blocks`, 0 for half of them (PixArt-delta: Chen et al. 2024, arXiv 2401.05252).

    At the start it changes no bit of the base's answer.
    """

    kind: Literal["controlnet"] = "controlnet"
    blocks: int = 0
    limits: ClassVar = {**ControlConfig.limits, "blocks": "[0, inf)"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor & (self.factor - 1):
            raise ValueError(f"controlnet factor must be a power of two, got {self.factor}")

    def beside(self, base: Steerable) -> Control:
        if isinstance(base, CrossAttentionUNet):
            if self.blocks:
                raise ValueError("controlnet blocks are those of a `dit`: a `unet` is copied down to its middle, set 0")
            return UNetBranch(self, base)
        if self.blocks > len(base.blocks):
            raise ValueError(f"controlnet blocks must be at most the backbone's {len(base.blocks)}, got {self.blocks}")
        return DiTBranch(self, base)


class HintNetwork(nn.Module):
    """A hint (B, channels, H, W) -> (B, width, h, w), 0 at the start, of the size of the latents: two convolutions, the
    second of stride 2, as often as the factor asks for. With a `patch`, one vector for each patch of the latents.

    Weights N(0, 2 / fan-in) (He et al. 2015, arXiv 1502.01852): PyTorch's own start lets a hint fade from layer to
    layer, to a fiftieth at a factor of 4, and it is heeded later.
    """

    def __init__(self, channels: int, width: int, factor: int, patch: int = 0) -> None:
        super().__init__()
        halvings = factor.bit_length() - 1
        widths = [HINT_WIDTHS[min(i, len(HINT_WIDTHS) - 1)] for i in range(halvings + 1)]
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Conv2d(above, outputs, 3, padding=1, stride=stride)
            for above, below in pairwise(widths) for outputs, stride in ((above, 1), (below, 2)))
        self.conv_out = (nn.Conv2d(widths[-1], width, patch, stride=patch) if patch
                         else nn.Conv2d(widths[-1], width, 3, padding=1))
        for layer in (self.conv_in, *self.blocks):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        zero(self.conv_out)

    def forward(self, hint: Tensor) -> Tensor:
        features = self.conv_in(hint)
        for block in self.blocks:
            features = block(F.silu(features))
        y: Tensor = self.conv_out(F.silu(features))
        return y


class UNetBranch(Control, WayDown):
    """Of a U-Net: a convolution 1x1 speaks for each feature map that the way up takes in, 13 in Stable Diffusion. The
    parameters are named as diffusers names a ControlNet's."""

    def __init__(self, config: ControlNet, base: CrossAttentionUNet) -> None:
        super().__init__(config)
        for name in self.PARTS:
            setattr(self, name, None if (part := getattr(base, name)) is None else trainable(part))
        self.position, widths = base.position, base.config.channels
        self.controlnet_cond_embedding = HintNetwork(config.hint_channels, widths[0], config.factor)
        kept = [widths[0], *(width for width in widths for _ in range(base.config.blocks + 1))][:-1]
        self.controlnet_down_blocks = nn.ModuleList(zero_convolution(width) for width in kept)
        self.controlnet_mid_block = zero_convolution(widths[-1])
        self.to(base.conv_in.weight)

    def encode(self, hint: Tensor) -> list[Tensor]:
        """The features that join the first ones."""
        return [self.controlnet_cond_embedding(hint)]

    def residuals(self, base: Steerable, x: Tensor, noise_level: Tensor, cond: Cond) -> dict[str, list[Tensor]]:
        """See `Control.residuals`."""
        (hint,) = self.features(x, cond)
        kept, _ = self.down(x, noise_level, cond, first=hint)
        spoken = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        return {"kept": [speak(y) for speak, y in zip(spoken, kept, strict=True)]}


class DiTBranch(Control):
    """Of a DiT: a zero linear layer after each copied block. What the first one reads comes from the base."""

    def __init__(self, config: ControlNet, base: DiffusionTransformer) -> None:
        super().__init__(config)
        count, width = config.blocks or max(1, len(base.blocks) // 2), base.config.width
        self.blocks = nn.ModuleList(trainable(block) for block in base.blocks[:count])
        self.hint_network = HintNetwork(config.hint_channels, width, config.factor, base.config.patch)
        self.spoken = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        zero(self.spoken)
        self.to(base.patch_embedding.weight)

    def encode(self, hint: Tensor) -> list[Tensor]:
        """The vectors (B, N, D) that join the tokens of the patches."""
        return [self.hint_network(hint).flatten(2).transpose(1, 2)]

    def residuals(self, base: Steerable, x: Tensor, noise_level: Tensor, cond: Cond) -> dict[str, list[Tensor]]:
        """See `Control.residuals`."""
        assert isinstance(base, DiffusionTransformer)
        tokens, given = base.begin(x, noise_level, cond)
        (hint,), outputs = self.features(x, cond), []
        tokens = tokens + F.pad(hint, (0, 0, given.prefix, 0))
        for i, (block, speak) in enumerate(zip(self.blocks, self.spoken, strict=True)):
            tokens = base.step(block, i, tokens, given)
            outputs.append(speak(tokens))
        return {"outputs": outputs}


def trainable(part: nn.Module) -> nn.Module:
    """A copy of a frozen part, to be trained."""
    return copy.deepcopy(part).requires_grad_()


def zero_convolution(width: int) -> nn.Conv2d:
    """1x1, and 0."""
    layer = nn.Conv2d(width, width, 1)
    zero(layer)
    return layer


ADAPTERS = (ControlNet,)
