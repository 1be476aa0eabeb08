"""The discriminators of stage one: of patches (Isola et al. 2017, section 3.2; LDM's layout) and of features."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_SIDE = 32  # pixels a side that every feature network of the lpips package can take
FLOOR = 1e-12  # of the mean square of a level's features: gradients stay finite where all vanish


@dataclass(frozen=True, kw_only=True)
class Discriminator(ABC):
    """What tells images from reconstructions: `width` channels, `layers` of the member's own sort."""

    on_features = False  # whether `build` needs a feature network

    width: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        if self.width < 1 or self.layers < 1:
            raise ValueError("a discriminator needs width and layers of at least 1.")

    @property
    @abstractmethod
    def smallest_image(self) -> int:
        """The least side of an image that can be judged."""

    @abstractmethod
    def build(self, features: nn.Module | None = None) -> nn.Module:
        """A freshly initialised discriminator: convolutions N(0, 0.02²), norm weights N(1, 0.02²), biases 0, as in
        LDM. features: images in [-1, 1] -> maps (B, C_k, H_k, W_k), for those that judge by it.
        """


@dataclass(frozen=True, kw_only=True)
class PatchShape(Discriminator):
    """What one patch discriminator is made of: `layers` strided convolutions, receptive field 16, 34, 70, 142 for 1, 2,
    3, 4 layers.

    norm: "group" keeps images independent of each other; "batch" is LDM's (2,765,633 parameters at the defaults).
    """

    norm: Literal["group", "batch", "none"] = "group"
    image_channels: int = 3

    def __post_init__(self) -> None:
        Discriminator.__post_init__(self)  # super() does not survive pydantic's copy of a dataclass
        if self.image_channels < 1:
            raise ValueError(f"a patch discriminator needs image_channels of at least 1, got {self.image_channels}.")
        if self.norm not in ("group", "batch", "none"):
            raise ValueError(f'the discriminator\'s norm must be "group", "batch" or "none", got "{self.norm}".')


@dataclass(frozen=True, kw_only=True)
class PatchGAN(PatchShape):
    """One patch discriminator (Isola et al. 2017)."""

    kind: Literal["patch"] = "patch"

    @property
    def smallest_image(self) -> int:
        """Pixels a side that leave one patch."""
        return 3 << self.layers  # one patch is left

    def build(self, features: nn.Module | None = None) -> PatchDiscriminator:
        """A freshly initialised discriminator, seeded by the caller; `features` are not used."""
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
        """Pixels a side that leave one patch at the coarsest scale."""
        return 3 << self.layers + self.scales - 1

    def build(self, features: nn.Module | None = None) -> MultiScaleDiscriminator:
        """A freshly initialised discriminator, seeded by the caller; `features` are not used."""
        return MultiScaleDiscriminator(self)


@dataclass(frozen=True, kw_only=True)
class FeatureGAN(Discriminator):
    """Small heads on the last `layers` levels of a frozen feature network, which here is that of LPIPS (Projected GANs,
    Sauer et al. 2021, without their random mixing of levels; StyleGAN-T, 2023, without batch norm).
    """

    kind: Literal["features"] = "features"
    on_features = True
    layers: int = 4

    @property
    def smallest_image(self) -> int:
        """Pixels a side that the feature network needs."""
        return LEAST_SIDE

    def build(self, features: nn.Module | None = None) -> FeatureDiscriminator:
        """ValueError without a feature network, and where it has fewer levels than `layers`."""
        if features is None:
            raise ValueError("a discriminator of kind features needs a feature network.")
        return FeatureDiscriminator(self, features)


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


class FeatureDiscriminator(nn.Module):
    """images (B, C, H, W) in [-1, 1] -> one map of logits per level of the feature network, finest first.

    A head sees f / rms(f), over channels and positions of an image, so that levels and backbones of any scale train
    alike. The feature network passes gradients on to images and has no part in parameters or state.
    """

    def __init__(self, config: FeatureGAN, features: nn.Module) -> None:
        super().__init__()
        self.smallest_image = config.smallest_image
        self.frozen = (features,)  # in a tuple: no module of this one, so neither trained, saved nor moved with it
        with torch.no_grad():
            channels = [level.shape[1] for level in features(torch.zeros(1, 3, LEAST_SIDE, LEAST_SIDE))]
        if len(channels) < config.layers:
            raise ValueError(f"the feature network has {len(channels)} levels, fewer than {config.layers} layers.")
        self.heads = nn.ModuleList(_head(count, config.width) for count in channels[-config.layers :])
        self.apply(_initialise)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """ValueError if a side is below `smallest_image`."""
        check_side(images, self.smallest_image)
        levels = list(self.frozen[0](images))[-len(self.heads) :]
        scales = [(level.float().square().mean((1, 2, 3), keepdim=True) + FLOOR).rsqrt() for level in levels]
        return tuple(head(f * scale) for head, f, scale in zip(self.heads, levels, scales, strict=True))


def maps(logits: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The logits of any discriminator as float32 maps, over which a loss is averaged."""
    return tuple(part.float() for part in ((logits,) if isinstance(logits, Tensor) else logits))


def check_side(images: Tensor, smallest: int) -> None:
    """ValueError if a side of the images is below `smallest`."""
    if min(images.shape[-2:]) < smallest:
        raise ValueError(
            f"the discriminator needs images of at least {smallest} pixels a side, "
            f"got {images.shape[-2]}x{images.shape[-1]}: take fewer layers, or another kind."
        )


def _head(channels: int, width: int) -> nn.Sequential:
    """Features (B, channels, h, w) -> logits (B, 1, h, w), each of 3x3 positions."""
    inner = nn.Conv2d(channels, width, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2)
    return nn.Sequential(*inner, nn.Conv2d(width, 1, 1))


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


DISCRIMINATORS = (PatchGAN, MultiScale, FeatureGAN)
