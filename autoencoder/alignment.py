"""Latents aligned with a frozen vision model's features, so that they are easier to diffuse in (Yao and Wang 2025)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.images import as_rgb


class VisionFeatures(nn.Module):
    """A frozen vision model: images (B, C, H, W) in [-1, 1], as `as_rgb` shows them -> its last features
    (B, D, h, w) on the grid asked for.

    Pictures are resized to the model's own square of `size` pixels and normalised by its mean and std (of [0, 1]); the
    features' square grid is resized to the one asked for, bilinearly. network: pixel_values (B, 3, size, size) -> an
    output whose last_hidden_state is a map (B, D, g, g) or tokens (B, n + g², D) led by n class and register tokens.
    Stays in eval mode; no gradient reaches it or the images. ValueError for a network of another output.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network, self.size = network, size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()
        self.width = self(torch.zeros(1, 3, size, size), (1, 1)).shape[1]

    def train(self, mode: bool = True) -> VisionFeatures:
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, D, *grid) float32."""
        images = as_rgb(images)
        if tuple(images.shape[2:]) != (self.size, self.size):
            images = F.interpolate(images.float(), (self.size, self.size), mode="bicubic", antialias=True).clamp(-1, 1)
        found = self.network(pixel_values=((images + 1) / 2 - self.mean) / self.std)
        features = getattr(found, "last_hidden_state", None)
        if features is None or features.ndim not in (3, 4):
            raise ValueError("the vision model gives no last_hidden_state of tokens or of a map.")
        if features.ndim == 3:
            side = math.isqrt(features.shape[1])  # class and register tokens are fewer than the next square needs
            features = features[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        return F.interpolate(features.float(), grid, mode="bilinear", antialias=True)


class Alignment(nn.Module):
    """mean relu(1 − m₁ − cos(z'_i, f_i)) + mean relu(|cos(z'_i, z'_j) − cos(f_i, f_j)| − m₂) over positions i and pairs
    i, j, per image (B,).

    z' = W z, W a learned 1x1 convolution from the latents' channels to the features' `width`: the marginal cosine and
    distance-matrix terms of VA-VAE (Yao and Wang 2025, section 3.2; margins ½ and ¼; both of z', as in the authors'
    code). In float32 also under autocast. Positions squared are held in memory: 256 at f16 and 256 pixels, 1024 at f8.
    """

    def __init__(self, channels: int, width: int, cosine_margin: float = 0.5, distance_margin: float = 0.25) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, 1, bias=False)
        self.cosine_margin, self.distance_margin = cosine_margin, distance_margin

    def forward(self, z: Tensor, features: Tensor) -> Tensor:
        """z (B, C, h, w), features (B, width, h, w) -> (B,)."""
        with torch.autocast(z.device.type, enabled=False):
            ours = F.normalize(self.projection(z.float()).flatten(2), dim=1)
            theirs = F.normalize(features.float().flatten(2), dim=1)
            apart = F.relu(1 - self.cosine_margin - (ours * theirs).sum(1)).mean(1)
            difference = ours.transpose(1, 2) @ ours - theirs.transpose(1, 2) @ theirs
            unlike = F.relu(difference.abs() - self.distance_margin).mean((1, 2))
        total: Tensor = apart + unlike
        return total


class Tap:
    """Hands z on to `move`, and hears ∂L/∂z of what is made of it in the backward pass: `square` = ‖∂L/∂z‖².

    For an alignment weighed by w = ‖∂L_picture/∂z‖ / ‖∂L_align/∂z‖ (Yao and Wang 2025, section 3.2, who take both at
    the encoder's last convolution, in passes of their own): the decoder's share of it without a second pass.
    """

    square: Tensor

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        self.move = move

    def __call__(self, z: Tensor) -> Tensor:
        handed: Any = z.view_as(z)  # another name for it: what is asked of z itself is not heard
        handed.register_hook(self._hear)
        return self.move(handed)

    def _hear(self, slope: Tensor) -> None:
        self.square = slope.float().square().sum()
