"""The patch discriminator of stage one (Isola et al. 2017, section 3.2; LDM's layout)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class PatchGAN:
    """Shape of a patch discriminator: `layers` strided convolutions, receptive field 16, 34, 70, 142 for layers 1, 2,
    3, 4.

    norm: "group" keeps images independent of each other; "batch" is LDM's (2,765,633 parameters at the defaults).
    """

    kind: Literal["patch"] = "patch"
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
    def smallest_image(self) -> int:
        """The least side of an image that leaves one patch."""
        return 3 << self.layers

    def build(self) -> PatchDiscriminator:
        """A freshly initialised discriminator: convolutions N(0, 0.02²), norm weights N(1, 0.02²), biases 0, as in
        LDM.
        """
        return PatchDiscriminator(self)


class PatchDiscriminator(nn.Module):
    """images (B, C, H, W) -> logits of being real (B, 1, h, w), one per overlapping patch."""

    def __init__(self, config: PatchGAN) -> None:
        super().__init__()
        self.smallest_image = config.smallest_image
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
        if min(images.shape[-2:]) < self.smallest_image:
            raise ValueError(
                f"the discriminator needs images of at least {self.smallest_image} pixels a side, "
                f"got {images.shape[-2]}x{images.shape[-1]}: take fewer layers."
            )
        logits: Tensor = self.main(images)
        return logits


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


DISCRIMINATORS = (PatchGAN,)
