"""The learning rate as a function of the step, and the optimiser's state by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from training.loop import optim
from training.settings.sections import Optimizer


def rate(step: int, steps: int = 110, **settings: object) -> float:
    return optim.learning_rate(Optimizer(lr=2.0, warmup=10, **settings), step, steps)  # type: ignore[arg-type]


def test_learning_rate() -> None:
    assert [rate(step, decay="constant") for step in (0, 4, 9, 10, 109)] == pytest.approx([0.2, 1, 2, 2, 2])
    assert [rate(step, decay="linear") for step in (9, 10, 60, 110, 500)] == pytest.approx([2, 2, 1, 0, 0])
    assert rate(35, final_lr=0.1) == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert rate(110, final_lr=0.1) == pytest.approx(0.2)
    assert optim.learning_rate(Optimizer(lr=1.0, warmup=0), 0, 10) == 1.0
    assert optim.learning_rate(Optimizer(lr=1.0, warmup=50), 9, 10) == pytest.approx(0.2)  # ends while warming up


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        network(torch.randn(5, 3, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_decay_on_matrices_only_and_scale() -> None:
    network = model()
    optimizer = optim.build(Optimizer(weight_decay=0.1), [network], scale=0.5)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {id(p): 0.1 if p.ndim > 1 else 0.0 for p in network.parameters()}
    optim.set_learning_rate(optimizer, 3.0)
    assert {g["lr"] for g in optimizer.param_groups} == {1.5}


def test_pack_and_unpack_continue_exactly() -> None:
    whole, cut, again = model(), model(), model()
    settings = Optimizer(lr=0.1, weight_decay=0.01)
    ours, theirs = optim.build(settings, [whole]), optim.build(settings, [cut])
    train(whole, ours, 3, 1), train(cut, theirs, 3, 1)
    names = {id(p): name for name, p in cut.named_parameters()}
    packed = optim.pack(theirs, names)
    assert set(packed) == {f"{n}.{m}" for n in names.values() for m in ("step", "exp_avg", "exp_avg_sq")}
    again.load_state_dict(cut.state_dict())
    fresh = optim.build(settings, [again])
    optim.unpack(fresh, {id(p): name for name, p in again.named_parameters()}, packed)
    train(whole, ours, 4, 2), train(again, fresh, 4, 2)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    saved = optim.pack(theirs, names)
    assert all(torch.equal(packed[key], saved[key]) for key in packed)  # a copy was taken, not the tensors


def test_a_module_tells_the_rates_of_its_own_parameters() -> None:
    """As LoRA+ does of B; by what it leaves unsaid nothing changes."""
    network = model()
    plain = optim.build(Optimizer(weight_decay=0.1), [network], scale=0.5)
    assert [(g["scale"], g["weight_decay"], len(g["params"])) for g in plain.param_groups] == [(0.5, 0.1, 2),
                                                                                               (0.5, 0.0, 4)]
    setattr(network[2], "rates", {"weight": 16.0})  # noqa: B010
    told = optim.build(Optimizer(weight_decay=0.1), [nn.Sequential(network)], scale=0.5)
    scales = {id(p): (g["scale"], g["weight_decay"]) for g in told.param_groups for p in g["params"]}
    assert scales.pop(id(network[2].weight)) == (8.0, 0.1)
    assert {scale for scale, _ in scales.values()} == {0.5}
    assert len(scales) == 5
