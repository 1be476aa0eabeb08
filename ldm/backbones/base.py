"""What every denoising network is: latents, a noise level and a condition in; the prediction out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.checks import Checked
from ldm.conditioning import Cond


class Backbone(nn.Module, ABC):
    """A raw network y = f(x, noise level, cond); it knows no schedule, no guidance and no caption dropout.

    `channels` latent channels in, `out_channels` out (twice as many with a learned variance), `multiple` the number
    by which both sides of a latent must be divisible. `shares`: which attentions do as `Cond.share` says, "own" those
    of the picture's tokens over themselves and "cross" those over the text.
    """

    shares: frozenset[str] = frozenset()

    def __init__(self, *, channels: int, out_channels: int, multiple: int) -> None:
        super().__init__()
        self.channels, self.out_channels, self.multiple = channels, out_channels, multiple

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """x (B, channels, H, W), noise_level (B,) as the schedule shows it to a network -> (B, out_channels, H, W).

        Weights of another dtype than the latents (bfloat16, float16) work in theirs, and the answer comes in that of x;
        the noise level is embedded in float32 all the same. Under autocast nothing is cast here. Raises ValueError
        where H or W is not divisible by `multiple`.
        """
        self.check(x)
        dtype = next(self.parameters()).dtype
        if x.dtype == cond.context.dtype == dtype or torch.is_autocast_enabled(x.device.type):
            return self.predict(x, noise_level, cond)
        return self.predict(x.to(dtype), noise_level, cond.to(x.device, dtype)).to(x.dtype)

    @abstractmethod
    def predict(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """What `forward` gives, of latents and a condition in the dtype of the weights."""

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

    @abstractmethod
    def build(self, *, channels: int, context_dim: int, pooled_dim: int | None = None) -> Backbone:
        """The network for latents of `channels`, text of `context_dim` and `pooled_dim`; ValueError on a misfit."""


def need_pooled(wanted: bool, pooled_dim: int | None) -> int:
    """The width of the pooled text a backbone will read, 0 for none.

    Raises ValueError where the backbone wants pooled text and the text encoder gives none.
    """
    if wanted and pooled_dim is None:
        raise ValueError("the backbone adds pooled text, but the text encoder gives none: set pooled = false")
    return pooled_dim if wanted and pooled_dim is not None else 0
