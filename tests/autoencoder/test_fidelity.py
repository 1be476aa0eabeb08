"""Range conversion, PSNR and SSIM against definitions written out by hand in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoencoder.fidelity import psnr, ssim
from autoencoder.images import to_uint8, to_unit


def ssim_by_hand(a: np.ndarray, b: np.ndarray, size: int) -> float:
    """Wang et al. 2004 for one channel on 0..255, one window position at a time."""
    grid = np.arange(size) - (size - 1) / 2
    window = np.exp(-(grid[:, None] ** 2 + grid[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(a.shape[0] - size + 1):
        for j in range(a.shape[1] - size + 1):
            x, y = a[i : i + size, j : j + size], b[i : i + size, j : j + size]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            c1, c2 = 6.5025, 58.5225
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_every_byte_survives_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    images = to_unit(pixels)
    assert (images[0], images[255]) == (-1, 1)
    assert torch.equal(to_uint8(images), pixels)
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.6 / 127.5 - 1])).tolist() == [0, 255, 1]
    with pytest.raises(ValueError, match="uint8"):
        to_unit(images)


@pytest.mark.parametrize(("height", "width", "size"), [(16, 13, 11), (11, 11, 11), (8, 20, 7), (3, 3, 3), (1, 5, 1)])
def test_ssim_is_the_definition(height: int, width: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (2, 3, height, width), generator=generator).to(torch.uint8)
    b = (a.float() + 20 * torch.randn(a.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    expected = [
        np.mean([ssim_by_hand(a[i, c].numpy().astype(float), b[i, c].numpy().astype(float), size) for c in range(3)])
        for i in range(2)
    ]
    np.testing.assert_allclose(ssim(b, a).numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(ssim(to_unit(b), to_unit(a)).numpy(), expected, atol=1e-5)


def test_psnr_is_the_definition_and_per_image() -> None:
    a = torch.randint(0, 256, (3, 3, 5, 4)).to(torch.uint8)
    b = torch.randint(0, 256, (3, 3, 5, 4)).to(torch.uint8)
    difference = a.numpy().astype(float) - b.numpy()
    expected = 20 * np.log10(255 / np.sqrt((difference**2).mean((1, 2, 3))))
    np.testing.assert_allclose(psnr(a, b).numpy(), expected)
    np.testing.assert_allclose(psnr(to_unit(a), to_unit(b)).numpy(), expected, atol=1e-5)
    assert psnr(a[:1], a[:1]).item() == float("inf")
    torch.testing.assert_close(ssim(a, a), torch.ones(3, dtype=torch.float64))
