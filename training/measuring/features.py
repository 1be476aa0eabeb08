"""Feature networks to measure pictures in: Inception from given weights, seeded random ones, a user's classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoder.images import as_rgb, to_unit
from training.errors import DATA, UserError
from training.models.judge import load_classifier
from training.models.published import FILES, read_weights
from training.tensors import check_weights, content_hash

RANDOM_SEED = 0


@dataclass(frozen=True)
class Features:
    """uint8 pictures (B,C,H,W), as `as_rgb` shows them -> (B, dim), and the name that stands beside every number."""

    name: str
    dim: int
    extract: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        return self.extract(as_rgb(pixels))


def load_features(spec: str, device: torch.device | str = "cpu") -> Features:
    """`random`, `inception:FILE` (torchvision's inception_v3 weights) or the folder of a classifier.

    Inception sees pictures resized to 299 x 299 (bilinear, antialiased), in [-1, 1]; its features are the 2048 pooled
    ones. Raises UserError where there is no such network, never falling back by itself.
    """
    if spec == "random":
        network = RandomFeatures().to(device)
        return Features("random convolutions, seed 0", network.dim, network)
    if spec.startswith("inception"):
        return _inception(spec.partition(":")[2], device)
    if not (Path(spec) / "model.safetensors").is_file():
        raise UserError(
            f"--features {spec}: no such feature network",
            code=DATA,
            hint="use random, inception:FILE, or the folder of a train_classifier",
        )
    model = load_classifier(spec, device)
    return Features(f"classifier {content_hash(model.state_dict())[:12]}", model.head.in_features, model.features)


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


def _inception(file: str, device: torch.device | str) -> Features:
    if not file or not Path(file).is_file():
        raise UserError(
            f"--features inception: no weights at '{file}'",
            code=DATA,
            hint="give torchvision's inception_v3 weights as inception:FILE, or use --features random",
        )
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, init_weights=False, aux_logits=True)
    state = read_weights(Path(file))
    try:
        check_weights(state, network.state_dict(), file)
        network.load_state_dict(state)
    except RuntimeError:
        raise UserError(
            f"{file}: not the weights of torchvision's inception_v3",
            hint=f"its file is {FILES['inception']}, or the same tensors as safetensors",
            code=DATA,
        ) from None
    network.fc = nn.Identity()
    network.to(device).eval().requires_grad_(False)

    def extract(pixels: Tensor) -> Tensor:
        resized = F.interpolate(to_unit(pixels), (299, 299), mode="bilinear", antialias=True, align_corners=False)
        features: Tensor = network(resized)
        return features

    return Features(f"torchvision inception_v3 {content_hash(state)[:12]}, bilinear 299x299", 2048, extract)
