"""What keeps a discriminator from winning too early: R1, LeCAM, differentiable augmentation, a start by plateau."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

LECAM_DECAY = 0.99


def r1(logits: Sequence[Tensor], images: Tensor) -> Tensor:
    """½‖∇_x Σ D(x)‖² per real image (B,), with a graph, D's logits summed over patches and scales.

    Mescheder et al. 2018, eq. 9; StyleGAN2's convention. images (B, C, H, W) must require a gradient.
    """
    total = torch.stack([part.sum() for part in logits]).sum()
    (slope,) = torch.autograd.grad(total, images, create_graph=True)
    return 0.5 * slope.square().flatten(1).sum(1)


def lecam(real: Tensor, fake: Tensor, anchors: Tensor) -> Tensor:
    """mean relu(real − ā_fake)² + mean relu(ā_real − fake)² per image (B,), of logits (B, ...).

    anchors (2,): moving averages of the mean logits of images and of reconstructions (Tseng et al. 2021, eq. 3, in the
    one-sided form of the authors' code). Logits further apart than the averages are pulled back.
    """
    ahead, behind = F.relu(real - anchors[1]), F.relu(anchors[0] - fake)
    return ahead.square().flatten(1).mean(1) + behind.square().flatten(1).mean(1)


def move_anchors(anchors: Tensor | None, means: Tensor) -> Tensor:
    """The anchors after a step whose mean logits of images and reconstructions over the global batch are means (2,)."""
    return means if anchors is None else anchors.lerp(means, 1 - LECAM_DECAY)


@dataclass
class Plateau:
    """Tells when a loss no longer falls: the mean of a window of steps is above (1 − share) that of the one before."""

    share: float
    steps: int
    total: Tensor | float = 0.0
    count: int = 0
    before: float | None = None
    reached: bool = False

    def add(self, loss: Tensor) -> bool:
        """Count one step's loss (); whether the plateau has been reached, by this step or earlier."""
        self.total, self.count = self.total + loss, self.count + 1
        if self.count == self.steps:
            mean = float(self.total) / self.steps
            self.reached |= self.before is not None and mean > (1 - self.share) * self.before
            self.total, self.count, self.before = 0.0, 0, mean
        return self.reached


class Augmentation(ABC):
    """A differentiable change of images (Zhao et al. 2020, DiffAug, section 3), the same for a picture and its
    reconstruction.
    """

    draws: int

    @abstractmethod
    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """images (B, C, H, W), uniform (B, draws) in [0, 1) -> (B, C, H, W)."""


@dataclass(frozen=True, kw_only=True)
class Colour(Augmentation):
    """Brightness shifted by ±½, then saturation scaled by 0..2 and contrast by ½..3/2 about their means."""

    kind: Literal["colour"] = "colour"
    draws = 3

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        brightness, saturation, contrast = (
            u.view(-1, 1, 1, 1).to(images.device, images.dtype) for u in uniform.unbind(1)
        )
        images = images + brightness - 0.5
        grey = images.mean(1, keepdim=True)
        images = grey + (images - grey) * 2 * saturation
        mean = images.mean((1, 2, 3), keepdim=True)
        return mean + (images - mean) * (contrast + 0.5)


@dataclass(frozen=True, kw_only=True)
class Translation(Augmentation):
    """Shifted by up to 1/8 of each side, whole pixels, zeros where nothing was."""

    kind: Literal["translation"] = "translation"
    draws = 2

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        for axis, u in zip((2, 3), uniform.unbind(1), strict=True):
            side = images.shape[axis]
            reach = int(side / 8 + 0.5)
            shift = (u * (2 * reach + 1)).long().to(images.device) - reach
            source = torch.arange(side, device=images.device) - shift[:, None]  # (B, side)
            shape = [len(images), 1, 1, 1]
            shape[axis] = side
            there = ((source >= 0) & (source < side)).view(shape)
            index = source.clamp(0, side - 1).view(shape).expand_as(images)
            images = images.gather(axis, index) * there
        return images


@dataclass(frozen=True, kw_only=True)
class Cutout(Augmentation):
    """A rectangle of half of each side set to zero, its centre anywhere."""

    kind: Literal["cutout"] = "cutout"
    draws = 2

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        masks = []
        for axis, u in zip((2, 3), uniform.unbind(1), strict=True):
            side = images.shape[axis]
            size = int(side / 2 + 0.5)
            first = (u * (side + 1 - size % 2)).long().to(images.device) - size // 2
            place = torch.arange(side, device=images.device) - first[:, None]
            masks.append((place >= 0) & (place < size))
        return images * ~(masks[0][:, None, :, None] & masks[1][:, None, None, :])


AUGMENTATIONS = (Colour, Translation, Cutout)
AUGMENTED_BY = sum(member.draws for member in AUGMENTATIONS)  # uniform numbers an image needs


def augment(images: Tensor, uniform: Tensor, kinds: Sequence[str]) -> Tensor:
    """The augmentations named, in the order of `AUGMENTATIONS`; uniform (B, AUGMENTED_BY) in [0, 1)."""
    first = 0
    for member in AUGMENTATIONS:
        if member().kind in kinds:
            images = member()(images, uniform[:, first : first + member.draws])
        first += member.draws
    return images
