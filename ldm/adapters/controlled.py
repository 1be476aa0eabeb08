"""A frozen backbone and the branches beside it, which read a hint and add residuals to the backbone's features."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ldm.adapters.base import Adapter, AdapterConfig
from ldm.backbones.base import Backbone
from ldm.backbones.dit import DiffusionTransformer
from ldm.backbones.unet import CrossAttentionUNet
from ldm.conditioning import Cond
from ldm.schedules import NoiseSchedule
from ldm.text import TextEncoder

Steerable = CrossAttentionUNet | DiffusionTransformer


@dataclass(frozen=True, kw_only=True)
class ControlConfig(AdapterConfig):
    """What control branches share: a hint of `hint_channels`, in [0, 1], `factor` times the size of the latents: the
    factor of the base's autoencoder. Of both 0 is what the data have."""

    small: ClassVar[Mapping[str, Any]] = {"hint_channels": 3, "factor": 8}
    hint_channels: int = 0
    factor: int = 0
    limits: ClassVar[Mapping[str, str]] = {"hint_channels": "[0, inf)", "factor": "[0, inf)"}

    def settled(self, factor: int, hint_channels: int) -> Self:
        """See `AdapterConfig.settled`. Raises ValueError without hints, and for others than the config names."""
        if not hint_channels:
            raise ValueError(f"a {self.kind} learns from hints, and there are none beside these latents")
        for name, given in (("factor", factor), ("hint_channels", hint_channels)):
            if (own := getattr(self, name)) not in {0, given}:
                raise ValueError(f"adapter.{name} is {own}, that of these latents {given}: leave it out")
        return replace(self, factor=factor, hint_channels=hint_channels)

    def build(self, backbone: Backbone, text: TextEncoder) -> Control:
        """See `AdapterConfig.build`. Raises ValueError for a backbone that takes no residuals, and where the config
        leaves something open."""
        if not self.factor or not self.hint_channels:
            raise ValueError(f"adapter.factor and adapter.hint_channels say what hints a {self.kind} reads: set both")
        return self.beside(steerable(backbone))

    @abstractmethod
    def beside(self, base: Steerable) -> Control:
        """A freshly initialised branch for this base. Raises ValueError where it has no place in it."""


class Control(Adapter):
    """A branch beside a backbone. Several add up, each by its strength, and are called at their noise levels alone."""

    levels: tuple[float, float] | None = None
    _last: tuple[tuple[object, ...], Tensor, list[Tensor]] | None = None

    def __init__(self, config: ControlConfig) -> None:
        super().__init__(hint="image")
        self.config = config

    @abstractmethod
    def encode(self, hint: Tensor) -> list[Tensor]:
        """All that the branch reads of a hint (B, hint_channels, H, W), whatever the noise level."""

    @abstractmethod
    def residuals(self, base: Steerable, x: Tensor, noise_level: Tensor, cond: Cond) -> Mapping[str, Sequence[Tensor]]:
        """What is added in the backbone, by the argument of its `predict` that takes it."""

    def attach(self, backbone: Backbone, text: TextEncoder) -> tuple[Backbone, TextEncoder]:
        """See `Adapter.attach`: around the backbone, or beside the branches that are there. Raises ValueError where
        it is one of them."""
        if not isinstance(backbone, Controlled):
            return Controlled(backbone, [self]), text
        if self in backbone.branches:
            raise ValueError("the adapter is attached already")
        backbone.branches.append(self)
        return backbone, text

    def during(self, low: float, high: float, schedule: NoiseSchedule) -> None:
        """Work at shares of noise sigma / (alpha + sigma) in [low, high] alone, as the interval of a guidance.

        The backbone is told the schedule's noise level, which rises with that share. Raises ValueError on nonsense.
        """
        if not 0 <= low <= high <= 1:
            raise ValueError(f"control interval must be two numbers 0 <= low <= high <= 1, got {low} and {high}")
        share = torch.tensor([low, high], dtype=torch.float64)
        ends = schedule.noise_level(schedule.time(2 * torch.log((1 - share) / share))).tolist()
        slack = 1e-6 * max([1.0, *(abs(end) for end in ends if math.isfinite(end))])  # a level may come in float32
        self.levels = None if (low, high) == (0, 1) else (ends[0] - slack, ends[1] + slack)

    def weight(self, noise_level: Tensor) -> float | Tensor:
        """What residuals are multiplied by: the strength, or one (B,) each where samples lie in and out of `levels`."""
        if self.levels is None or self.strength == 0:
            return self.strength
        inside = (self.levels[0] <= noise_level) & (noise_level <= self.levels[1])
        if not inside.any():  # a GPU waits here, which is less than a branch costs
            return 0.0
        return self.strength if inside.all() else self.strength * inside

    def features(self, x: Tensor, cond: Cond) -> list[Tensor]:
        """`encode` of this condition's hint: once a picture, not once a step, while nothing learns.

        Raises ValueError where the condition has no such hint, and for one of another size or channel count.
        """
        if (hint := cond.extras.get(self.hint)) is None:
            raise ValueError(f"the control branch reads the hint {self.hint!r}, and the condition has "
                             f"{' and '.join(map(repr, cond.extras)) or 'none'}: give one, or set the strength to 0")
        wanted = (self.config.hint_channels, *(self.config.factor * side for side in x.shape[2:]))
        if hint.shape[1:] != wanted:
            got, must = ("x".join(map(str, shape)) for shape in (hint.shape[1:], wanted))
            raise ValueError(f"the hint {self.hint!r} is {got} (channels, height, width) and must be {must} for these "
                             f"latents: set adapter.hint_channels, and adapter.factor to the autoencoder's")
        read, device = hint.to(next(self.parameters()).dtype), hint.device.type
        if torch.is_grad_enabled() or hint.is_inference() or torch.compiler.is_compiling():
            self._last = None  # a fused optimizer changes weights without a new version of them
            return self.encode(read)
        # Of a hint unchanged, by weights unchanged: averaged weights stand in for others in the same parameter.
        state = (hint._version, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
                 *((p.data_ptr(), p._version) for p in self.parameters()))
        if self._last is None or self._last[1] is not hint or self._last[0] != state:
            self._last = state, hint, self.encode(read)
        return self._last[2]


class Controlled(Backbone):
    """A base whose `predict` is given what its branches say: sum_i strength_i residual_i, in every place.

    To others it is the base: the same channels, sizes and shared attentions. Without a branch at work, its answers are
    the base's bit for bit. Raises ValueError, when it is built, for a backbone that takes no residuals.
    """

    def __init__(self, base: Backbone, branches: Sequence[Control]) -> None:
        base = steerable(base)
        super().__init__(channels=base.channels, out_channels=base.out_channels, multiple=base.multiple)
        self.base, self.branches, self.config, self.shares = base, nn.ModuleList(branches), base.config, base.shares
        self.image_channels = base.image_channels  # which are joined to the latents here, for branches and base alike

    def predict(self, x: Tensor, noise_level: Tensor, cond: Cond) -> Tensor:
        """See `Backbone.predict`."""
        sums: dict[str, list[Tensor]] = {}
        for branch in self.branches:
            assert isinstance(branch, Control)
            weight = branch.weight(noise_level)
            if not isinstance(weight, Tensor) and weight == 0:
                continue
            for name, maps in branch.residuals(self.base, x, noise_level, cond).items():
                scaled = [times(residual, weight) for residual in maps]
                sums[name] = [a + b for a, b in zip(sums[name], scaled, strict=True)] if name in sums else scaled
        y: Tensor = self.base.predict(x, noise_level, cond, **sums)
        return y


def times(residual: Tensor, weight: float | Tensor) -> Tensor:
    """A residual (B, ...) by one number, or by one for each sample."""
    if isinstance(weight, Tensor):
        return residual * weight.to(residual.dtype).view(-1, *[1] * (residual.ndim - 1))
    return residual if weight == 1 else residual * weight


def steerable(backbone: Backbone) -> Steerable:
    """The base of a backbone, without what is attached. Raises ValueError for one that takes no residuals."""
    base = backbone.base if isinstance(backbone, Controlled) else backbone
    if not isinstance(base, Steerable):
        raise ValueError(f"a control branch needs a backbone that takes residuals, a `unet` or a `dit`, "
                         f"not {type(base).__name__}")
    return base
