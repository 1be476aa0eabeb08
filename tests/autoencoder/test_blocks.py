"""The upsampling block against its definition, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from autoencoder.blocks import Downsample, Upsample


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (4, 4)])
def test_upsample_is_nearest_then_convolution(height: int, width: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    block = Upsample(4).double().to(memory_format=layout)
    x = torch.randn(2, 4, height, width, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), block.conv.weight, block.conv.bias, padding=1)
    actual, upstream = block(x), torch.randn_like(expected)
    torch.testing.assert_close(actual, expected)
    wanted = (x, block.conv.weight, block.conv.bias)
    for ours, theirs in zip(
        torch.autograd.grad(actual, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_downsample_pads_right_and_bottom_only() -> None:
    block = Downsample(2)
    x = torch.randn(1, 2, 4, 6)
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1)), block.conv.weight, block.conv.bias)[:, :, 1::2, 1::2]
    torch.testing.assert_close(block(x), expected)
