"""Pictures of one and four channels as networks trained on RGB are shown them."""

from __future__ import annotations

import torch

from autoencoder.images import as_rgb, to_uint8


def test_grey_is_repeated_and_rgba_laid_on_white() -> None:
    """c a + (1 − a), for floats and bytes alike; the gradient reaches colour where it is seen, and alpha."""
    grey, clear = torch.tensor([[-1.0, 0.5]]).view(1, 1, 1, 2), torch.zeros(1, 4, 1, 3)
    assert torch.equal(as_rgb(grey), grey.repeat(1, 3, 1, 1)) and as_rgb(clear[:, :3]).shape[1] == 3
    clear[0, :3] = torch.tensor([-1.0, 0.0, 1.0])[:, None, None]
    clear[0, 3, 0] = torch.tensor([-1.0, 0.0, 1.0])
    wanted = torch.tensor([[1.0, 0.0, -1.0], [1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])
    assert torch.equal(as_rgb(clear)[0, :, 0], wanted)
    assert (as_rgb(to_uint8(clear))[0, :, 0].int() - to_uint8(wanted).int()).abs().max() <= 1
    clear.requires_grad_()
    as_rgb(clear).sum().backward()
    assert clear.grad is not None
    assert clear.grad[0, :3, 0].tolist() == [[0.0, 0.5, 1.0]] * 3 and clear.grad[0, 3, 0].tolist() == [-1.5] * 3
