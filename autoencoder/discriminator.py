"""The patch discriminators of stage one (Isola et al. 2017, section 3.2; LDM's layout)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class PatchShape(ABC):
    """What one patch discriminator is made of: `layers` strided convolutions, receptive field 16, 34, 70, 142 for 1, 2,
    3, 4 layers.

    norm: "group" keeps images independent of each other; "batch" is LDM's (2,765,633 parameters at the defaults).
    """

    width: int = 64
    layers: int = 3
    norm: Literal["group", "batch", "none"] = "group"
    image_channels: int = 3

    def __post_init__(self) -> None:
        if self.width < 1 or self.layers < 1 or self.image_channels < 1:
            raise ValueError("a patch discriminator needs width, layers and image_channels of at least 1.")
        if self.norm not in ("group", "batch", "none"):
            raise ValueError(f'the discriminator\'s norm must be "group", "batch" or "none", got "{self.norm}".')

    @property
    @abstractmethod
    def smallest_image(self) -> int:
        """The least side of an image that leaves one patch."""

    @abstractmethod
    def build(self) -> nn.Module:
        """A freshly initialised discriminator: convolutions N(0, 0.02²), norm weights N(1, 0.02²), biases 0, as in
        LDM.
        """


@dataclass(frozen=True, kw_only=True)
class PatchGAN(PatchShape):
    """One patch discriminator (Isola et al. 2017)."""

    kind: Literal["patch"] = "patch"

    @property
    def smallest_image(self) -> int:
        return 3 << self.layers

    def build(self) -> PatchDiscriminator:
        return PatchDiscriminator(self)


@dataclass(frozen=True, kw_only=True)
class MultiScale(PatchShape):
    """`scales` patch discriminators of one shape, on the image, its half, its quarter, ...: the coarser ones see larger
    structures (pix2pixHD, Wang et al. 2018, section 3.2).
    """

    kind: Literal["multi-scale"] = "multi-scale"
    scales: int = 2

    def __post_init__(self) -> None:
        PatchShape.__post_init__(self)  # super() does not survive pydantic's copy of a dataclass
        if self.scales < 1:
            raise ValueError(f"a multi-scale discriminator needs at least 1 scale, got {self.scales}.")

    @property
    def smallest_image(self) -> int:
        return 3 << self.layers + self.scales - 1

    def build(self) -> MultiScaleDiscriminator:
        return MultiScaleDiscriminator(self)


class PatchDiscriminator(nn.Module):
    """images (B, C, H, W) -> logits of being real (B, 1, h, w), one per overlapping patch."""

    def __init__(self, config: PatchShape) -> None:
        super().__init__()
        self.smallest_image = 3 << config.layers
        widths = [config.width * min(2**n, 8) for n in range(config.layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(config.image_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for n in range(1, config.layers + 1):
            stride = 2 if n < config.layers else 1
            # a norm has its own bias
            parts += [nn.Conv2d(widths[n - 1], widths[n], 4, stride, 1, bias=config.norm == "none")]
            parts += [*_norm(config.norm, widths[n]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """ValueError if a side is below `smallest_image`."""
        check_side(images, self.smallest_image)
        logits: Tensor = self.main(images)
        return logits


class MultiScaleDiscriminator(nn.Module):
    """images (B, C, H, W) -> one map of logits per scale, finest first."""

    def __init__(self, config: MultiScale) -> None:
        super().__init__()
        self.smallest_image = config.smallest_image
        self.scales = nn.ModuleList(PatchDiscriminator(config) for _ in range(config.scales))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """ValueError if a side is below `smallest_image`."""
        check_side(images, self.smallest_image)
        found = []
        for k, scale in enumerate(self.scales):
            images = F.avg_pool2d(images, 2) if k else images
            found.append(scale(images))
        return tuple(found)


def maps(logits: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The logits of any discriminator as float32 maps, over which a loss is averaged."""
    return tuple(part.float() for part in ((logits,) if isinstance(logits, Tensor) else logits))


def check_side(images: Tensor, smallest: int) -> None:
    """ValueError if a side of the images is below `smallest`."""
    if min(images.shape[-2:]) < smallest:
        raise ValueError(
            f"the discriminator needs images of at least {smallest} pixels a side, "
            f"got {images.shape[-2]}x{images.shape[-1]}: take fewer layers."
        )


def _norm(norm: str, channels: int) -> list[nn.Module]:
    if norm == "none":
        return []
    return [nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(math.gcd(32, channels), channels)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm) and module.bias is not None:
        nn.init.zeros_(module.bias)


DISCRIMINATORS = (PatchGAN, MultiScale)
