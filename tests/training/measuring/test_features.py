"""The feature networks that distances are measured in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torchvision.models import inception_v3

from autoencoder.images import to_unit
from training.files import file_sha256
from training.measuring.features import load_features
from training.models import published
from training.tensors import content_hash, save_tensors


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """Inception of random weights."""
    torch.manual_seed(0)
    return inception_v3(weights=None, init_weights=False).eval()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_inception_gives_the_pooled_features_of_a_files_weights(
    suffix: str, network: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes through torchvision's network up to its classifier, of pictures of 299 pixels."""
    file = tmp_path / f"inception_v3.{suffix}"
    save_tensors(file, network.state_dict()) if suffix == "safetensors" else torch.save(network.state_dict(), file)
    monkeypatch.setitem(published.FILES, "inception", f"inception-{file_sha256(file)[:8]}.pth")
    features = load_features(f"torchvision-inception:{file}")
    assert features.dim == 2048 and content_hash(network.state_dict())[:12] in features.name
    assert "not FID" in features.name and not features.published
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    pooled: list[torch.Tensor] = []
    network.avgpool.register_forward_hook(lambda module, given, found: pooled.append(found.flatten(1)))
    with torch.no_grad():
        network(F.interpolate(to_unit(pixels), (299, 299), mode="bilinear", antialias=True, align_corners=False))
    found = features(pixels)
    assert found.shape == (2, 2048) and not torch.equal(found[0], found[1])
    torch.testing.assert_close(found, pooled[0])
    torch.testing.assert_close(features(pixels[1:]), found[1:], rtol=1e-4, atol=1e-5)


def test_random_features_are_means_and_deviations_of_every_layers_maps() -> None:
    """Seeded by 0, whatever was drawn before; a picture's features are its own."""
    features, pixels = load_features("random"), torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(0)
    x, wanted = to_unit(pixels), []
    layers = [torch.nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 32), (32, 64), (64, 128), (128, 256))]
    for layer in layers:
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    for layer in layers:
        x = F.relu(layer(x)).detach()
        maps = x.flatten(2)
        wanted += [maps.mean(2), (maps.square().mean(2) - maps.mean(2).square()).clamp_min(0).sqrt()]
    assert features.dim == 960 and "seed 0" in features.name
    torch.testing.assert_close(features(pixels), torch.cat(wanted, 1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(features(pixels[1:2]), features(pixels)[1:2], rtol=1e-5, atol=1e-6)
