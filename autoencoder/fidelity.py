"""PSNR and SSIM, per image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoder.precision import double

PEAK = 255.0


def _eight_bit_scale(images: Tensor) -> Tensor:
    """uint8, or float in [-1, 1] (not rounded), to float64 on the scale 0..255."""
    return double(images) if images.dtype == torch.uint8 else (double(images) + 1) * (PEAK / 2)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """10 log10(255² / MSE) in dB per image, infinite for equal images: (B, C, H, W) uint8 or float in [-1, 1] -> (B,)
    float64, on their `double_device`.
    """
    error = _eight_bit_scale(images) - _eight_bit_scale(reference)
    return 10 * torch.log10(PEAK**2 / error.square().flatten(1).mean(1))


def _blur(x: Tensor, size: int, std: float) -> Tensor:
    """Gaussian window of `size` x `size` taps that sums to 1, valid positions only: (N, 1, H, W) -> (N, 1, H-size+1,
    W-size+1).
    """
    offsets = torch.arange(size, dtype=x.dtype, device=x.device) - (size - 1) / 2
    taps = (-offsets.square() / (2 * std**2)).exp()
    taps = taps / taps.sum()
    return F.conv2d(F.conv2d(x, taps.view(1, 1, size, 1)), taps.view(1, 1, 1, size))


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Mean structural similarity per image: (B, C, H, W) uint8 or float in [-1, 1] -> (B,) float64, 1 for equal images.

    Gaussian window 11x11 of std 1.5, K1 = 0.01, K2 = 0.03, range 255, valid positions, mean over channels (Wang et al.
    2004, eq. 13). A side below 11 takes the largest odd window that fits.
    """
    height, width = images.shape[-2:]
    side = min(11, height, width)
    size = side - 1 + side % 2
    x, y = (_eight_bit_scale(picture).reshape(-1, 1, height, width) for picture in (images, reference))
    mean_x, mean_y, xx, yy, xy = _blur(torch.cat((x, y, x * x, y * y, x * y)), size, 1.5).chunk(5)
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x.square() + yy - mean_y.square() + c2)
    return (luminance * structure).reshape(len(images), -1).mean(1)
