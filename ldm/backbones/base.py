"""What every denoising network is: latents, a noise level and a condition in; the prediction out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self, Unpack, overload

import torch
from torch import Tensor, nn

from ldm.backbones.image import NUMBERS, ImageInputs, LevelEmbedding, SizeEmbedding, Widened, need_extra
from ldm.checks import Checked
from ldm.conditioning import Cond


class Backbone(nn.Module, ABC):
    """A raw network y = f(x, noise level, cond); it knows no schedule, no guidance and no caption dropout.

    `channels` latent channels in, `out_channels` out (twice as many with a learned variance), `multiple` the number
    by which both sides of a latent must be divisible. `shares`: which attentions do as `Cond.share` says, "own" those
    of the picture's tokens over themselves and "cross" those over the text. `input_layer` reads the latents, and
    `image_channels` of an image condition behind them, where there are any.
    """

    shares: frozenset[str] = frozenset()
    input_layer: ClassVar[str] = "conv_in"

    def __init__(self, *, channels: int, out_channels: int, multiple: int) -> None:
        super().__init__()
        self.channels, self.out_channels, self.multiple = channels, out_channels, multiple
        self.image_channels = 0
        self.level_embedding: LevelEmbedding | None = None
        self.number_embeddings: nn.ModuleDict | None = None
        self.size_embedding: SizeEmbedding | None = None

    def shown(self, image_channels: int = 0, image_level: bool = False, numbers: tuple[str, ...] = (),
              size_unit: int = 0) -> Self:
        """Itself, made to read `Cond.extras["image"]` (B, image_channels, H, W), "image_level" (B,) in [0, 1], further
        extras (B,) by the names of `numbers` too, and, where a latent's side is `size_unit` pixels, "size" (B, 6).

        What is new is zero at first: it answers as before, bit for bit, whatever the image and its level. Raises
        ValueError where it has no layers that could be made to.
        """
        if (image_channels or image_level or numbers or size_unit) and not hasattr(self, self.input_layer):
            raise ValueError(f"{type(self).__name__} reads no image condition, no span, no guidance scale and no size: "
                             "set image.kind to none, objective.kind to denoising, and conditioning.size to false")
        if image_channels:
            layer = getattr(self, self.input_layer)
            setattr(self, self.input_layer, Widened(layer, image_channels * layer.weight.shape[1] // self.channels))
            self.image_channels = image_channels
        if image_level or numbers or size_unit:
            width = len(self.get_parameter("time_embedding.linear_2.weight"))
        if image_level:
            self.level_embedding = LevelEmbedding(width)
        if numbers:
            self.number_embeddings = nn.ModuleDict({name: LevelEmbedding(width, NUMBERS) for name in numbers})
        if size_unit:
            self.size_embedding = SizeEmbedding(width, size_unit)
        return self

    def extended(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of one that reads no image and no further numbers, for this one that does: zeros for what these
        add, so that it answers as theirs does. Weights of the same inputs come back as they are."""
        own, name, wide = self.state_dict(), f"{self.input_layer}.weight", dict(weights)
        theirs = weights.get(name)
        if self.image_channels and theirs is not None and theirs.shape[1] < own[name].shape[1]:
            more = own[name].shape[1] - theirs.shape[1]
            wide[name] = torch.cat([theirs, theirs.new_zeros(len(theirs), more, *theirs.shape[2:])], dim=1)
        added = ("level_embedding.", "number_embeddings.", "size_embedding.")
        return {**{key: part for key, part in own.items() if key.startswith(added)}, **wide}

    @overload
    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond, tap: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond, tap: float) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond,
                tap: float | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, channels, H, W), noise_level (B,) as the schedule shows it to a network -> (B, out_channels, H, W).

        With a `tap`, a share of the depth in (0, 1], also the feature there: tokens (B, N, `tap_width`) of the picture
        alone, row by row. Weights of another dtype than the latents (bfloat16, float16) work in theirs, and the answer
        comes in that of x; levels are embedded in float32 all the same. Under autocast nothing is cast here. Raises
        ValueError where H or W is not divisible by `multiple`, and where an image condition that is read is missing or
        of another size.
        """
        self.check(x)
        joint = self.joined(x, cond)
        dtype = next(self.parameters()).dtype
        as_it_is = x.dtype == cond.context.dtype == dtype or torch.is_autocast_enabled(x.device.type)
        if not as_it_is:
            given = cond.to(x.device)  # extras are cast where they are read: a level must not be rounded
            joint, cond = joint.to(dtype), given.to(x.device, dtype)._replace(extras=given.extras)
        if tap is None:
            y = self.predict(joint, noise_level, cond)
            return y if as_it_is else y.to(x.dtype)
        y, feature = self.tapped(joint, noise_level, cond, tap)
        return (y, feature) if as_it_is else (y.to(x.dtype), feature.to(x.dtype))

    def units(self) -> list[nn.Module]:
        """The parts that hold most of the weights and are each called as a whole, of which one after the other is at
        work: what devices that share out the weights bring together at a time. None: all at once."""
        return []

    @abstractmethod
    def predict(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """What `forward` gives, of latents with the image behind them and a condition in the dtype of the weights, its
        extras as they were given."""

    def tap_width(self, share: float) -> int:
        """The width of the feature at a share of the depth. Raises ValueError where none is given there."""
        raise ValueError(f"{type(self).__name__} gives no feature to compare: set representation.kind to none")

    def tapped(self, x: Tensor, noise_level: Tensor, cond: Cond, share: float) -> tuple[Tensor, Tensor]:
        """What `predict` gives, and the feature at a share of the depth."""
        raise NotImplementedError

    def joined(self, x: Tensor, cond: Cond) -> Tensor:
        """What the input layer reads: x, and behind its channels those of `cond.extras["image"]`."""
        if not self.image_channels:
            return x
        image = need_extra(cond, "image", (x.shape[0], self.image_channels, *x.shape[2:]))
        return torch.cat([x, image.to(x.dtype)], dim=1)

    def check(self, x: Tensor) -> None:
        """Raises ValueError, saying what fits, for latents of the wrong channel count or size."""
        channels, height, width = x.shape[1:]
        if channels != self.channels:
            raise ValueError(f"the latents have {channels} channels, the backbone was built for {self.channels}")
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"latents of {height}x{width} do not fit: both sides must be divisible by {self.multiple}")


class BackboneConfig(Checked, ABC):
    """What the config of a backbone declares: a frozen dataclass with a `kind`, and what others read of it.

    `learned_variance`: it answers twice the channels; `pooled`: it reads the text encoder's pooled vector. A kind that
    has them makes them fields. `small`: the settings that make a network small enough for a test.
    """

    learned_variance: bool = False
    pooled: bool = False
    small: ClassVar[Mapping[str, Any]] = {}

    @property
    def narrow(self) -> Self | None:
        """The config of the width at which the learning rate was found, where that is another one's (`share_rates`)."""
        return None

    @abstractmethod
    def build(self, *, channels: int, context_dim: int, pooled_dim: int | None = None,
              **image: Unpack[ImageInputs]) -> Backbone:
        """The network for latents of `channels`, text of `context_dim` and `pooled_dim`, and what it is `shown` of an
        image condition; ValueError on a misfit."""


def need_pooled(wanted: bool, pooled_dim: int | None) -> int:
    """The width of the pooled text a backbone will read, 0 for none.

    Raises ValueError where the backbone wants pooled text and the text encoder gives none.
    """
    if wanted and pooled_dim is None:
        raise ValueError("the backbone adds pooled text, but the text encoder gives none: set pooled = false")
    return pooled_dim if wanted and pooled_dim is not None else 0


def share_rates(network: nn.Module, base: nn.Module) -> None:
    """Let a learning rate found at the width of `base` do for the wider `network`: each layer is told, as `narrower`,
    base inputs / inputs, by which its matrix's rate is to be multiplied with Adam (muP: Yang et al. 2022, arXiv
    2203.03466, table 3; heads are of one size, so attention needs no other scale)."""
    for layer, slim in zip(network.modules(), base.modules(), strict=True):
        if isinstance(layer, nn.Linear | nn.Conv2d) and isinstance(slim, nn.Linear | nn.Conv2d):
            layer.narrower = slim.weight[0].numel() / layer.weight[0].numel()  # type: ignore[assignment]
