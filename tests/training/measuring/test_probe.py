"""The counts that the probe tells beside its distances, which mean nothing without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoencoder.kl import KL
from training.data.samples import Images
from training.measuring.distances import Moments
from training.measuring.features import load_features
from training.measuring.probe import probe
from training.shards.reading import ShardSet


@pytest.mark.parametrize("asked", [5, 100])
def test_as_many_samples_as_reconstructions(shapes: Path, monkeypatch: pytest.MonkeyPatch, asked: int) -> None:
    """Of the two distances one is what the other could at best reach; where too few are held out, fewer are drawn."""
    counted: list[int] = []

    def distance(real: Moments, other: Moments) -> float:
        assert real.count == len(held_out)
        counted.append(other.count)
        return 0.0

    monkeypatch.setattr("training.measuring.probe.frechet_distance", distance)
    monkeypatch.setattr("training.measuring.probe.BATCH", 4)
    monkeypatch.setattr("training.measuring.probe.SAMPLING_STEPS", 1)
    train, held_out = (Images(ShardSet(shapes, split)) for split in ("train", "val"))
    torch.manual_seed(0)
    model = KL(channels=(4, 4, 4), blocks=1, groups=2, mid_attention=False).build().eval()
    numbers = probe(model, train, held_out, load_features("random"), 1, asked)
    assert counted == [min(asked, len(held_out))] * 2 and numbers["samples"] == counted[0]
    assert numbers["real_pictures"] == len(held_out) < 100
