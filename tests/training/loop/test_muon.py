"""Muon: what orthogonalisation makes of a matrix, one step by its formula, and exact continuation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.benchmarks.meters import allocated
from training.loop import optim
from training.loop.muon import PIECE, Muon, by_products, by_squares, matrices, orthogonal
from training.settings.sections import Optimizer

SETTINGS = Optimizer(lr=0.1, matrices="muon", weight_decay=0.01, matrix_lr=0.5)


def model() -> nn.Module:
    torch.manual_seed(0)
    narrow_and_wide = nn.Conv2d(3, 32, 3), nn.GroupNorm(8, 32), nn.Conv2d(32, 48, 3), nn.Flatten()
    return nn.Sequential(*narrow_and_wide, nn.Linear(48, 64), nn.Embedding(40, 40), nn.Linear(64, 4))


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for layer in network if not isinstance(layer, nn.Embedding)]  # type: ignore[union-attr]
    for _ in range(steps):
        y = torch.randn(5, 3, 5, 5, generator=generator)
        for layer in layers:
            y = layer(y)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(32, 32), (40, 96), (96, 40)])
def test_singular_values_become_equal_and_their_vectors_stay(shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = torch.logspace(0, -1.6, s.shape[1]).expand_as(s)  # over its norm from 0.011 to 0.5
    x = u @ torch.diag_embed(s) @ v
    y = orthogonal(x)
    assert torch.linalg.svdvals(y).min() > 0.72 and torch.linalg.svdvals(y).max() < 1.28
    turned = u.mT @ y @ v.mT
    torch.testing.assert_close(turned, torch.diag_embed(turned.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-4)
    torch.testing.assert_close(orthogonal(1000 * x), y, rtol=1e-4, atol=1e-5)
    assert torch.equal(orthogonal(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def test_the_smallest_values_grow_and_stay_finite() -> None:
    x = torch.diag_embed(torch.tensor([1.0] * 31 + [1e-5]))[None]
    last = orthogonal(x)[0, -1, -1].item()
    assert last == pytest.approx(8.0934 * 3.6366 * 2.6613 * 1e-5 / 31**0.5, rel=1e-3)


def test_both_ways_to_it_are_one() -> None:
    """Also of matrices with singular values from 1 to 1e-6."""
    u, s, v = torch.linalg.svd(torch.randn(2, 24, 70, generator=torch.Generator().manual_seed(2)), full_matrices=False)
    x = u @ torch.diag_embed(torch.logspace(0, -6, 24).expand_as(s)) @ v / 2
    torch.testing.assert_close(by_squares(x), by_products(x), rtol=1e-3, atol=3e-4)


def test_hidden_matrices_alone() -> None:
    network = model()
    assert matrices([network]) == {network[2].weight, network[4].weight}  # neither 3 -> 32 nor 64 -> 4, no embedding
    network[4].requires_grad_(False)
    assert matrices([network]) == {network[2].weight}


def test_one_step_by_the_formula() -> None:
    """At rate r = 0.5 lr: w - r (0.2 sqrt(max side) orthogonal(g) + decay w); the rest moves as AdamW moves it."""
    network, other = model(), model()
    optimizer = optim.build(SETTINGS, [network])
    plain = optim.build(Optimizer(lr=0.1, weight_decay=0.01), [other])
    assert isinstance(optimizer, Muon)
    for o in (optimizer, plain):
        optim.set_learning_rate(o, 0.1)
    before = [p.detach().clone() for p in network.parameters()]
    train(network, optimizer, 1, 1), train(other, plain, 1, 1)
    again = model()
    y = torch.randn(5, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    again[6](again[4](again[3](again[2](again[1](again[0](y)))))).square().mean().backward()
    gradients = {name: p.grad for name, p in again.named_parameters()}
    for (name, p), was, moved in zip(network.named_parameters(), before, other.parameters(), strict=True):
        if name not in ("2.weight", "4.weight"):
            assert torch.equal(p, moved)
            continue
        gradient = gradients[name]
        assert gradient is not None
        turned = orthogonal(gradient.flatten(1)[None]).view_as(p)  # of g, of which u is a multiple
        size = 0.2 * max(p.flatten(1).shape) ** 0.5
        torch.testing.assert_close(p.detach(), was - 0.05 * (size * turned + 0.01 * was), rtol=1e-4, atol=1e-5)


def test_momentum_is_nesterovs() -> None:
    weight = nn.Linear(32, 32, bias=False)
    start = weight.weight.detach().clone()
    optimizer = optim.build(Optimizer(matrices="muon", momentum=0.9), [weight])
    optim.set_learning_rate(optimizer, 1.0)
    first, second = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(3))
    for gradient in (first, second):
        weight.weight.grad = gradient.clone()
        optimizer.step()
    m = 0.9 * 0.1 * first + 0.1 * second
    expected = start - 0.2 * 32**0.5 * orthogonal(torch.stack([first, 0.9 * m + 0.1 * second])).sum(0)
    torch.testing.assert_close(weight.weight.detach(), expected, rtol=1e-4, atol=1e-4)


def test_a_step_in_pieces_is_the_same_and_holds_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twelve matrices of 64x64: in stacks of five, five and two, and all at once."""
    moved, highest = [], []
    for numbers in (12 * 64 * 64, 5 * 64 * 64 + 1):
        monkeypatch.setitem(PIECE, "cpu", numbers)
        torch.manual_seed(0)
        network = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(12))
        optimizer = optim.build(SETTINGS, [network])
        generator = torch.Generator().manual_seed(1)
        for p in network.parameters():
            p.grad = torch.randn(64, 64, generator=generator)
        optimizer.step()
        highest.append(allocated(optimizer.step, "cpu")[1])
        moved.append(torch.stack([*network.parameters()]))
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-5, atol=1e-6)
    assert highest[1] < 0.5 * highest[0] < 0.5 * 6 * 4 * 12 * 64 * 64


def test_a_parameter_without_a_gradient_stays() -> None:
    network = model()
    optimizer = optim.build(SETTINGS, [network])
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_pack_and_unpack_continue_exactly() -> None:
    whole, cut, again = model(), model(), model()
    ours, theirs = optim.build(SETTINGS, [whole]), optim.build(SETTINGS, [cut])
    train(whole, ours, 3, 1), train(cut, theirs, 3, 1)
    names = {id(p): name for name, p in cut.named_parameters()}
    packed = optim.pack(theirs, names)
    assert "2.weight.momentum" in packed and "2.weight.exp_avg" not in packed and "6.weight.exp_avg" in packed
    again.load_state_dict(cut.state_dict())
    fresh = optim.build(SETTINGS, [again])
    optim.unpack(fresh, {id(p): name for name, p in again.named_parameters()}, packed)
    train(whole, ours, 4, 2), train(again, fresh, 4, 2)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
