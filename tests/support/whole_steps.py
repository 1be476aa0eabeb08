"""Whole steps of a loop, taken or skipped, and all that they move."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import torch
from torch import Tensor

from training.loop.loop import Loop
from training.loop.watchdogs import LEAST


def take(loop: Loop, step: int, rate: float = 1e-3) -> dict[str, Tensor]:
    """One step; what it told."""
    values = loop.gradients(step)
    return values | loop.step(step, rate)


def everything(loop: Loop, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that a checkpoint holds, and what the stage has gathered of a step, but for data position and watchdogs."""
    snapshot = loop.snapshot(step)
    tensors = {f"{file}/{k}": v.clone() for file, part in snapshot.tensors.items() for k, v in part.items()}
    state = {key: copy.deepcopy(part) for key, part in snapshot.state.items() if key not in ("place", "watchdogs")}
    lists = {key: len(value) for key, value in vars(loop.stage).items() if isinstance(value, list)}
    gathered = {**lists, "unset": [key for key, value in vars(loop.stage).items() if value is None]}
    return tensors, {**state, "gathered": gathered}


def skip(loop: Loop, step: int) -> None:
    """A step whose gradients are spikes, whatever they are."""
    for name in loop.optimizers:
        loop.watchdogs.recent[f"grad_norm/{name}"] = deque([1e-12] * LEAST)
    assert take(loop, step)["skipped"] == 1
    for name in loop.optimizers:
        loop.watchdogs.recent[f"grad_norm/{name}"].clear()


def skipped_leaves_all_as_it_was(loop: Loop, steps: int) -> None:
    """All that a checkpoint holds, but for data position and watchdogs; the step after moves some of it."""
    for step in range(steps):
        assert "skipped" not in take(loop, step)
    tensors, state = everything(loop, steps)
    skip(loop, steps)
    after, state_after = everything(loop, steps)
    assert after.keys() == tensors.keys() and state_after == state
    for key, value in tensors.items():
        assert torch.equal(after[key], value), key
    assert "skipped" not in take(loop, steps + 1)
    assert any(not torch.equal(value, tensors[key]) for key, value in everything(loop, steps)[0].items())
