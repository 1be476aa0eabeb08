"""The probe's training, and the counts it tells beside its distances, which mean nothing without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoencoder.images import to_unit
from autoencoder.kl import KL
from training.data.images import Images
from training.measuring.features import Features
from training.measuring.probe import RATE, WARMUP, batches, denoiser, fit, held_out_loss, probe
from training.shards.reading import ShardSet


@pytest.mark.parametrize("asked", [5, 100])
def test_as_many_samples_as_reconstructions(shapes: Path, monkeypatch: pytest.MonkeyPatch, asked: int) -> None:
    """Of the two distances one is what the other could at best reach; where too few are held out, fewer are drawn."""
    counted: list[int] = []

    def distance(real: torch.Tensor, other: torch.Tensor) -> float:
        assert len(real) == len(held_out)
        counted.append(len(other))
        return 0.0

    monkeypatch.setattr("training.measuring.probe.frechet_distance", distance)
    monkeypatch.setattr("training.measuring.probe.BATCH", 4)
    monkeypatch.setattr("training.measuring.probe.SAMPLING_STEPS", 1)
    train, held_out = (Images(ShardSet(shapes, split)) for split in ("train", "val"))
    torch.manual_seed(0)
    model = KL(channels=(4, 4, 4), blocks=1, groups=2, mid_attention=False).build().eval()
    features = Features("means", 3, lambda pixels: to_unit(pixels).mean((2, 3)))
    numbers = probe(model, train, held_out, features, 1, asked)
    assert counted == [min(asked, len(held_out))] * 2 and numbers["samples"] == counted[0]
    assert numbers["real_pictures"] == len(held_out) < 100


def test_the_probe_is_fitted_with_a_rate_that_rises_and_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    """RATE (step + 1) / WARMUP, and from where that is less RATE (1 - step / steps); the held-out loss falls."""
    rates: list[float] = []

    class Seen(torch.optim.AdamW):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Seen)
    monkeypatch.setattr("training.measuring.probe.BATCH", 8)
    model = KL(channels=(4, 4), blocks=1, latent_channels=1, groups=2, mid_attention=False).build().eval()
    means = torch.linspace(-1, 1, 16).view(16, 1, 1, 1).expand(-1, 1, 2, 2)
    moments = torch.cat([means, torch.full_like(means, -9.0)], 1)
    network = denoiser(moments, model)
    before = held_out_loss(network, model, moments)
    fit(network, model, moments, moments, 40)
    assert rates == pytest.approx([RATE * min((step + 1) / WARMUP, 1 - step / 40) for step in range(40)])
    assert max(rates) > 0.6 * RATE and rates[-1] < 0.03 * RATE
    assert sum(held_out_loss(network, model, moments).values()) < 0.9 * sum(before.values())


def test_the_probe_learns_from_pictures_of_all_the_data(shapes: Path) -> None:
    """Evenly, as many as are wanted at most."""
    images = Images(ShardSet(shapes, "train"))
    everything = to_unit(next(images.chunks(range(len(images)), len(images))).data)
    for count, stride in ((10, len(images) // 10), (len(images), 1), (1000, 1)):
        found = torch.cat(list(batches(images, count, torch.device("cpu"))))
        assert torch.equal(found, everything[::stride][:count])
