"""`random`: seeded convolutions, which need no weights and no network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.images import to_unit
from training.measuring.networks.base import Features
from training.tensors import content_hash

RANDOM_SEED = 0


class RandomFeatures(nn.Module):
    """Four seeded random convolutions of stride 2 (32 to 256 maps); mean and deviation of every map: 960 numbers."""

    dim = 2 * (32 + 64 + 128 + 256)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 32), (32, 64), (64, 128), (128, 256)))
            for layer in self.layers:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 pictures (B, 3, H, W) -> mean and deviation of each map of each layer (B, 960) float32."""
        x, found = to_unit(pixels), []
        for layer in self.layers:
            x = F.relu(layer(x))
            found += [x.mean((2, 3)), x.std((2, 3), correction=0)]
        return torch.cat(found, 1)


def load(rest: str, device: torch.device | str) -> Features:
    """The one random network there is; `rest` is empty."""
    network = RandomFeatures().to(device)
    facts = {"weights": content_hash(network.state_dict()), "preprocessing": "[-1, 1], as large as they are"}
    return Features("random convolutions, seed 0", network.dim, network, facts)
