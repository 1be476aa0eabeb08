"""LPIPS on any feature network that is passed in, float32 and safe where features vanish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.images import as_rgb


class ScaledTrunk(nn.Module):
    """An input scaling followed by a network that gives a sequence of feature maps of RGB; others as `as_rgb` shows
    them."""

    def __init__(self, scaling: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.scaling, self.network = scaling, network

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        """images (B, 1, 3 or 4, H, W) in [-1, 1] -> one map (B, C, h, w) per level."""
        maps: Sequence[Tensor] = self.network(self.scaling(as_rgb(images)))
        return maps


def _unit(features: Tensor) -> Tensor:
    """f / (‖f‖ + 1e-10) over the channels. An all-zero vector stays zero and gets gradient zero, where sqrt would give
    NaN.
    """
    square = features.square().sum(1, keepdim=True)
    present = square > 0
    inverse = 1 / (torch.where(present, square, torch.ones_like(square)).sqrt() + 1e-10)
    return features * torch.where(present, inverse, torch.zeros_like(inverse))


class Perceptual(nn.Module):
    """LPIPS: Σ_k mean over positions of Σ_c w_kc (unit f_k(x̂) − unit f_k(x))²_c (Zhang et al. 2018, eq. 1), per image
    (B,).

    features: images in [-1, 1] -> list of maps (B, C_k, H_k, W_k). weights: one (C_k,) tensor per map, None = all
    ones. The network is frozen, stays in eval mode and runs in float32 also under autocast. Gradients reach x̂ only.
    """

    def __init__(self, features: nn.Module, weights: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.features = features
        self.maps = None if weights is None else len(weights)
        for k, weight in enumerate(weights or ()):
            self.register_buffer(f"weight{k}", weight.detach().flatten().float().clone())
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_lpips(cls, lpips: Any) -> Perceptual:
        """From an instance of `lpips.LPIPS` (version 0.1): its scaling, network and linear layers are taken over, not
        copied.
        """
        return cls(ScaledTrunk(lpips.scaling_layer, lpips.net), [lin.model[-1].weight for lin in lpips.lins])

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in eval mode: a measure does not change because its neighbours train."""
        return super().train(False)

    def target(self, images: Tensor) -> list[Tensor]:
        """Normalised features of the images, without a graph: computed once per image and step, for `distance`."""
        with torch.no_grad():
            return self._normalised(images)

    def distance(self, x_hat: Tensor, target: Sequence[Tensor]) -> Tensor:
        """LPIPS of x̂ (B, C, H, W) to the `target` features of its images: (B,) float32."""
        total = x_hat.new_zeros(len(x_hat), dtype=torch.float32)
        for k, (ours, theirs) in enumerate(zip(self._normalised(x_hat), target, strict=True)):
            channels = (ours - theirs).square().mean((2, 3))
            total = total + (channels.sum(1) if self.maps is None else channels @ self.get_buffer(f"weight{k}"))
        return total

    def forward(self, x_hat: Tensor, images: Tensor) -> Tensor:
        """LPIPS(x̂, x): (B, C, H, W) twice -> (B,) float32."""
        return self.distance(x_hat, self.target(images))

    def _normalised(self, images: Tensor) -> list[Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            maps = list(self.features(images.float()))
            if self.maps not in (None, len(maps)):
                raise ValueError(f"the feature network gives {len(maps)} maps, but there are weights for {self.maps}.")
            return [_unit(features) for features in maps]
