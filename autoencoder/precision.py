"""Where float64 is computed: on the device of the tensors, or on the CPU where the device has no such numbers."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT = ("mps",)  # Apple's GPUs


def double_device(device: torch.device | str) -> torch.device:
    """The device for float64 numbers that belong to tensors on `device`."""
    device = torch.device(device)
    return torch.device("cpu") if device.type in WITHOUT else device


def double(x: Tensor) -> Tensor:
    """x in float64, on `double_device`. It is moved first: a device cannot convert to what it does not have."""
    return x.to(double_device(x.device)).double()
