"""T2I-adapter: a small network beside a U-Net's way down, which reads a hint once a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.controlled import Control, ControlConfig, Steerable
from ldm.backbones.unet import CrossAttentionUNet
from ldm.conditioning import Cond


@dataclass(frozen=True, kw_only=True)
class T2IAdapter(ControlConfig):
    """Config of a T2I-adapter on a U-Net: `layers` residual blocks a level, whose features are added to the level's.

    Trained at `cubic` times. Not zero at the start: it changes the base's answer before it has learned. Mou et al. 2023
    (arXiv 2302.08453), section 3.3.
    """

    kind: Literal["t2i-adapter"] = "t2i-adapter"
    layers: int = 2
    limits: ClassVar = {**ControlConfig.limits, "layers": "(0, inf)"}

    def beside(self, base: Steerable) -> Control:
        if not isinstance(base, CrossAttentionUNet):
            raise ValueError("a t2i-adapter adds to the levels of a `unet`, and this is none: take a controlnet")
        return Pyramid(self, base)


class Residual(nn.Module):
    """x + conv1x1(relu(conv3x3(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block1, self.block2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.block2(F.relu(self.block1(x)))
        return y


class Level(nn.Module):
    """Residual blocks at one size, which is half the one before but for the first; another width by a convolution."""

    def __init__(self, inputs: int, width: int, layers: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.in_conv = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()
        self.resnets = nn.Sequential(*(Residual(width) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.resnets(self.in_conv(F.avg_pool2d(x, 2) if self.down else x))
        return y


class Pyramid(Control):
    """Features of a hint for each level of a U-Net. Its parameters are named as diffusers names a T2I-adapter's."""

    def __init__(self, config: T2IAdapter, base: CrossAttentionUNet) -> None:
        super().__init__(config)
        widths, self.factor = base.config.channels, config.factor
        self.conv_in = nn.Conv2d(config.hint_channels * config.factor**2, widths[0], 3, padding=1)
        self.body = nn.ModuleList(
            Level(inputs, width, config.layers, down=level > 0)
            for level, (inputs, width) in enumerate(zip((widths[0], *widths), widths, strict=False)))
        self.to(base.conv_in.weight)

    def encode(self, hint: Tensor) -> list[Tensor]:
        """The features of all levels, the largest first."""
        features = [self.conv_in(F.pixel_unshuffle(hint, self.factor))]
        for level in self.body:
            features.append(level(features[-1]))
        return features[1:]

    def residuals(self, base: Steerable, x: Tensor, noise_level: Tensor, cond: Cond) -> dict[str, list[Tensor]]:
        """See `Control.residuals`."""
        return {"levels": self.features(x, cond)}


ADAPTERS = (T2IAdapter,)
