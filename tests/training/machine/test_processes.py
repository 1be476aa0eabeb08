"""What starting a process sets up in it."""

from __future__ import annotations

import torch

from training.machine import processes


def test_denormals_are_flushed() -> None:
    """They slow a CPU many times over."""
    smallest = torch.tensor([1e-38])
    assert (smallest * 0.1).item() > 0
    accelerator = processes.start("cpu")
    assert (smallest * 0.1).item() == 0
    assert accelerator.device.type == "cpu" and accelerator.num_processes == 1
