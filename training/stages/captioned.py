"""What stage two trains as one module, told captions or their encoding; and what a step shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.backbones import Backbone
from ldm.backbones.routing import ROUTE
from ldm.conditioning import Cond
from ldm.jumps import beside
from ldm.noise import Noise
from ldm.objectives import Draw
from ldm.representation import RepresentationConfig, Represented
from ldm.text import TextEncoder
from ldm.uncertainty import Uncertainty, Weighed

if TYPE_CHECKING:
    from ldm.adapters import Adapter
    from training.data.latents import Latents


class Captions(NamedTuple):
    """What stands for a condition until a text encoder that learns has read it: captions, and extras beside them."""

    texts: list[str]
    extras: Mapping[str, Tensor]

    def distinct(self) -> list[str]:
        """A text a sample, equal where all that it is conditioned on is: with extras, which differ, nowhere."""
        return [f"{number} {text}" for number, text in enumerate(self.texts)] if self.extras else self.texts


class Sampled(NamedTuple):
    """Samples of a step: normalised latents, their condition, and what was drawn for them."""

    latents: Tensor
    cond: Any
    draw: Draw


def together(parts: Sequence[Sampled]) -> Sampled:
    """All in one batch."""
    if len(parts) == 1:
        return parts[0]
    latents, conds, draws = zip(*parts, strict=True)
    told = isinstance(conds[0], Captions)
    cond: Any = Captions([text for cond in conds for text in cond.texts], {}) if told else Cond.cat(conds)
    t, eps, factor = (torch.cat(part) for part in zip(*(draw[:3] for draw in draws), strict=True))
    more = {name: torch.cat([draw.more[name] for draw in draws]) for name in draws[0].more}
    return Sampled(torch.cat(latents), cond, Draw(t, eps, factor, more))


def distinct_captions(data: Latents, count: int, size: tuple[int, int] = (0, 0)) -> list[tuple[str, int]]:
    """Distinct captions of samples evenly over the data, each with a sample that has it; over and over where they are
    few. In buckets, of those of `size`, where there are some."""
    captions: dict[str, int] = {}
    for i in data.evenly(20 * count, size):
        captions.setdefault(data.captions(i)[0], i)
    samples = list(captions.items())[:count]
    return [samples[i % len(samples)] for i in range(count)]


class Captioned(nn.Module):
    """Backbone and, where they learn, text encoder, weighting and what its features are compared by as one module: a
    process wrapper sees every gradient. `features`: the channels of a vision model's beside the latents."""

    def __init__(self, backbone: Backbone, text: TextEncoder, uncertainty: Uncertainty | None,
                 representation: RepresentationConfig, features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.text = text if text.trainable else None
        self.uncertainty = uncertainty
        self.asked = representation
        self.representation = representation.build(backbone, features)

    @property
    def averaged(self) -> nn.ModuleDict:
        """All that is drawn with, by the names that it has here."""
        return nn.ModuleDict({name: part for name, part in self.named_children() if name != "representation"})

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond | Captions,
                compares: bool = False) -> Tensor | Weighed | Represented:
        """Captions (encoded here) or their encoding -> the backbone's prediction; with what its features cost where a
        step `compares` them."""
        if not isinstance(cond, Cond):
            assert self.text is not None
            cond = self.text(cond.texts)._replace(extras=cond.extras)
        if not compares or self.representation is None:
            return self.told(self.backbone(x, noise_level, cond), noise_level)
        prediction, feature = self.backbone(x, noise_level, cond, tap=self.asked.depth)
        cost = self.asked.weight * self.representation(feature, x.shape[2:], cond.extras)
        return Represented(self.told(prediction, noise_level), cost)

    def told(self, prediction: Tensor, noise_level: Tensor) -> Tensor | Weighed:
        """With the loss that is expected of it, where that is learned."""
        return prediction if self.uncertainty is None else Weighed(prediction, self.uncertainty(noise_level))


class Adapted(nn.Module):
    """An adapter and all that it is at work in, which stays as it is: only the adapter is trained, averaged, stored and
    seen by a process wrapper."""

    def __init__(self, adapter: Adapter, whole: Captioned) -> None:
        super().__init__()
        self.adapter = adapter
        self._whole = (whole,)  # in a tuple, so that it is no part of this module

    @property
    def backbone(self) -> nn.Module:
        """That of the base."""
        return self._whole[0].backbone

    def forward(self, x: Tensor, noise_level: Tensor, cond: Cond | Captions) -> Tensor | Weighed:
        """See `Captioned.forward`."""
        prediction: Tensor | Weighed = self._whole[0](x, noise_level, cond)
        return prediction


def scored(cond: Any, backbone: Any, latents: Tensor, noise: Noise) -> Any:
    """With the scores by which tokens pass by blocks, where the backbone of this config routes them."""
    if not getattr(backbone, "route", 0):
        return cond
    count = math.prod(side // backbone.patch for side in latents.shape[2:])
    return beside(cond, ROUTE, noise.uniform((count,), ROUTE))


def onto(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device; through pinned memory to a GPU, so that the host does not wait."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
