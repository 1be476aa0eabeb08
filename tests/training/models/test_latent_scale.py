"""What the latent normaliser is measured on: pictures from all over the data, whatever the number at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder.norm import LatentNorm
from training.models.latent_scale import fit_norm


class Rising:
    """Data whose picture number i is all i, and which notes the places it is asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, list[int]()

    def __len__(self) -> int:
        return self.count

    def chunks(self, places: Sequence[int], size: int, doing: str = "") -> Iterator[Any]:
        for start in range(0, len(places), size):
            part = list(places[start : start + size])
            self.asked += part
            pixels = torch.tensor(part, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
            yield SimpleNamespace(data=pixels)


def encode(images: Tensor) -> Tensor:
    """A posterior of one channel: the picture's number, and standard deviation 1."""
    mean = (images[:, :1, ::2, ::2] + 1) * 127.5
    return torch.cat([mean, torch.zeros_like(mean)], 1)


@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize(
    ("pictures", "count", "places"),
    [
        (200, 10, list(range(0, 200, 20))),
        (199, 10, list(range(0, 190, 19))),
        (95, 50, list(range(50))),  # less than twice as many: a stride of 1
        (8, 10, list(range(8))),
    ],
)
def test_the_scale_is_measured_evenly(pictures: int, count: int, places: list[int], size: int) -> None:
    """Shift is the mean of the pictures' numbers, scale² their variance and the posterior's own 1."""
    data, norm = Rising(pictures), LatentNorm(1)
    model = SimpleNamespace(norm=norm, latent_channels=1, encode=encode)
    fit_norm(model, data, count, size)  # type: ignore[arg-type]
    numbers = torch.tensor(places, dtype=torch.float64)
    assert data.asked == places
    assert norm.shift.item() == pytest.approx(numbers.mean().item(), rel=1e-5)
    assert norm.scale.item() == pytest.approx((numbers.var(correction=0) + 1).sqrt().item(), rel=1e-5)
