"""What a backbone is made to read besides text: channels of an image condition behind those of the latents, a level of
its noise, other numbers, and the size that a picture had and where it was cut."""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.backbones.embed import Projection, sinusoid
from ldm.conditioning import Cond

FEATURES, LEVELS = 256, 1000.0  # of a level in [0, 1]: it is embedded as the noise levels 0 to 1000 are
SIZE, SIZES = "size", 6  # the extra (B, 6) of `SizeEmbedding`
NUMBERS = 30.0  # of another number: smooth enough for what is learned of its derivative


class ImageInputs(TypedDict, total=False):
    """The channels of `Cond.extras["image"]` that are joined to the latents, whether "image_level" is read, the names
    of further extras (B,) that are; and where "size" is read, the pixels of a latent's side."""

    image_channels: int
    image_level: bool
    numbers: tuple[str, ...]
    size_unit: int


class Widened(nn.Module):
    """layer(x) + W more, for inputs x and then more; W is zero at first. Its weight is one tensor under the name of the
    layer's own, as published inpainting models have it.

    Two products and not one over all inputs, each of what lies in memory as it would alone: kernels differ in how they
    round, and so at first the sum is layer(x) to the last bit.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, inputs: int) -> None:
        super().__init__()
        own = layer.weight.detach()
        self.own = own.shape[1]
        self.weight = nn.Parameter(torch.cat([own, own.new_zeros(len(own), inputs, *own.shape[2:])], dim=1))
        self.bias, self.padding = layer.bias, getattr(layer, "padding", 0)
        self.out_channels = len(own)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, inputs, H, W) for a convolution, (B, N, inputs) for a linear layer."""
        own, more = (part.contiguous() for part in self.weight.tensor_split([self.own], dim=1))
        parts = x.tensor_split([self.own], dim=1 if own.ndim == 4 else -1)
        x, image = (part.contiguous() for part in parts) if x.is_contiguous() else parts
        if own.ndim == 2:
            return F.linear(x, own, self.bias) + F.linear(image, more)
        first = F.conv2d(x, own, self.bias, padding=self.padding)
        return first + F.conv2d(image, more, padding=self.padding)


class LevelEmbedding(nn.Module):
    """A number, such as a level in [0, 1], (B,) -> (B, width), added to the embedding of time; 0 at first."""

    def __init__(self, width: int, unit: float = LEVELS) -> None:
        super().__init__()
        self.unit = unit
        self.projection = Projection(FEATURES, width)
        for parameter in self.projection.linear_2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, level: Tensor) -> Tensor:
        y: Tensor = self.projection(sinusoid(level * self.unit, FEATURES))
        return y


class SizeEmbedding(nn.Module):
    """How a picture was cut, in pixels (B, 6) -> (B, width), added to the embedding of time; 0 at first.

    The numbers are the original height and width, the rows cut off above and the columns to the left, and the height
    and width of what was kept: each by its sinusoid of 256 features, all joined, as SDXL has them (Podell et al. 2023,
    arXiv 2307.01952, section 2.2). A height or width of 0 stands for that of the latents, `unit` pixels a side of one;
    so do all where none are told, with nothing cut off.
    """

    def __init__(self, width: int, unit: int) -> None:
        super().__init__()
        self.unit = unit
        self.projection = Projection(SIZES * FEATURES, width)
        for parameter in self.projection.linear_2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, told: Tensor | None, latents: Tensor) -> Tensor:
        """`told` (B, 6), None for none; `latents` (B, C, h, w)."""
        height, width = (self.unit * side for side in latents.shape[-2:])
        sides = [latents.new_full((1, 1), side, dtype=torch.float32) for side in (height, width, 0, 0, height, width)]
        own = torch.cat(sides, 1).expand(len(latents), SIZES)
        numbers = own if told is None else torch.where(told > 0, told, own)
        y: Tensor = self.projection(sinusoid(numbers.flatten(), FEATURES).view(len(latents), -1))
        return y


def with_size(time: Tensor, embedding: SizeEmbedding | None, cond: Cond, latents: Tensor) -> Tensor:
    """The embedding of time (B, width), and that of `cond.extras["size"]` (B, 6) where it is read. Raises ValueError
    for one of another shape."""
    if embedding is None:
        return time
    told = cond.extras.get(SIZE)
    added: Tensor = embedding(None if told is None else need_extra(cond, SIZE, (time.shape[0], SIZES)), latents)
    return time + added


def with_level(time: Tensor, embedding: LevelEmbedding | None, cond: Cond) -> Tensor:
    """The embedding of time (B, width), and that of `cond.extras["image_level"]` (B,) added where it is read."""
    if embedding is None:
        return time
    added: Tensor = embedding(need_extra(cond, "image_level", (time.shape[0],)))
    return time + added


def with_numbers(time: Tensor, embeddings: nn.ModuleDict | None, cond: Cond) -> Tensor:
    """The embedding of time (B, width), and those of the extras (B,) that are read, by their names."""
    for name, embedding in (embeddings or {}).items():
        number = cond.extras.get(name)
        if number is None:
            raise ValueError(f"this model was taught to read {name}, and is told none: draw with its own denoiser")
        time = time + embedding(number)
    return time


def need_extra(cond: Cond, name: str, shape: tuple[int, ...]) -> Tensor:
    """`cond.extras[name]`. Raises ValueError where it is missing or of another shape."""
    extra = cond.extras.get(name)
    if extra is None:
        given = ", ".join(cond.extras) or "none"
        raise ValueError(f"the backbone reads an image condition, and the extra {name!r} is missing (given: {given})")
    if extra.shape != shape:
        size, wanted = ("x".join(map(str, sides)) for sides in (extra.shape, shape))
        raise ValueError(f"the extra {name!r} is {size}, the backbone reads {wanted}")
    return extra
