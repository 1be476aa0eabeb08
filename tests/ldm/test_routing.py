"""Tokens that pass by blocks, and values of the first layer in all others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm.backbones.dit import DiffusionTransformer, DiT
from ldm.backbones.routing import ROUTE, kept, put_back
from ldm.conditioning import Cond

MODERN = {"width": 32, "depth": 4, "heads": 2, "patch": 1, "base_size": 4}


def build(**settings: object) -> DiffusionTransformer:
    torch.manual_seed(0)
    network = DiT(**{**MODERN, **settings}).build(channels=4, context_dim=8, pooled_dim=8)  # type: ignore[arg-type]
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    return network


def inputs(scores: Tensor | None = None) -> tuple[Tensor, Tensor, Cond]:
    g = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    cond = Cond(torch.randn(2, 3, 8, generator=g), mask, torch.randn(2, 8, generator=g))
    cond = cond if scores is None else cond._replace(extras={ROUTE: scores})
    return torch.randn(2, 4, 4, 4, generator=g), torch.rand(2, generator=g), cond


SCORES = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))


def test_those_of_the_least_scores_go_through_in_their_order() -> None:
    scores = torch.tensor([[0.9, 0.3, 0.5, 0.1], [0.6, 0.8, 0.2, 0.7]])
    assert kept(scores, 0.5, 2).tolist() == [[0, 1, 3, 5], [0, 1, 2, 4]]
    tokens = put_back(torch.ones(2, 4, 1), kept(scores, 0.5, 2), torch.zeros(2, 6, 1))
    assert tokens[..., 0].tolist() == [[1, 1, 0, 1, 0, 1], [1, 1, 1, 0, 1, 0]]


@pytest.mark.parametrize("text", ["cross", "in-context", "none"])
@pytest.mark.parametrize("position", ["rope", "sincos"])
def test_what_passes_by_is_what_the_kept_ones_would_be_alone(text: str, position: str) -> None:
    """By hand: the first block on all, the inner ones on the kept tokens, gathered, and the last on all again."""
    settings = {"text": text, "position": position, "value_residual": True, "route": 0.5, "qk_norm": True}
    network = build(**settings)
    x, level, cond = inputs(SCORES)
    tokens, given = network.begin(x, level, cond)
    going = kept(SCORES, 0.5, given.prefix)
    tokens = network.step(network.blocks[0], 0, tokens, given)
    for row in range(2):  # each sample alone, with plain indices
        own, one = tokens[row : row + 1].clone(), network.begin(x[row : row + 1], level[row : row + 1],
                                                                cond.select(slice(row, row + 1)))[1]
        rope = None if one.rope is None else (one.rope[0][going[row]], one.rope[1][going[row]])
        first = one.first[:, :, going[row]]  # type: ignore[index]
        mask = one.mask[..., going[row]] if text == "in-context" else one.mask  # type: ignore[index]
        inner = own[:, going[row]]
        for i in (1, 2):
            inner = network.step(network.blocks[i], i, inner, one._replace(rope=rope, first=first, mask=mask))
        own[:, going[row]] = inner
        last = network.step(network.blocks[3], 3, own, one)
        shift, scale = network.modulation(one.of_end).chunk(2, dim=1)
        answer = network.out(network.norm(last[:, one.prefix :]) * (1 + scale) + shift)
        whole = network(x, level, cond)[row]
        torch.testing.assert_close(whole.permute(1, 2, 0).reshape(16, 4), answer[0], rtol=1e-4, atol=1e-4)


def test_without_scores_nothing_passes_by() -> None:
    """To draw, a routed network is the plain one of the same weights."""
    routed, plain = build(route=0.5), build()
    plain.load_state_dict(routed.state_dict())
    x, level, cond = inputs()
    assert torch.equal(routed(x, level, cond), plain(x, level, cond))
    assert not torch.equal(routed(*inputs(SCORES)), plain(x, level, cond))


def test_every_token_teaches_and_is_taught() -> None:
    network = build(route=0.75)
    x, level, cond = inputs(SCORES)
    x.requires_grad_()
    network(x, level, cond).square().sum().backward()
    assert (x.grad != 0).all()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_values_of_the_first_layer() -> None:
    """With (1, 0) the layer without it; with (0, 1) the first layer's values in place of its own."""
    residual, plain = build(value_residual=True), build()
    plain.load_state_dict(residual.state_dict(), strict=False)
    mixes = [block.attention.mix for block in residual.blocks]  # type: ignore[union-attr]
    assert mixes[0] is None and all(mix is not None for mix in mixes[1:])
    with torch.no_grad():
        for mix in mixes[1:]:
            mix.copy_(torch.tensor([1.0, 0.0]))  # type: ignore[union-attr]
    assert torch.equal(residual(*inputs()), plain(*inputs()))
    attention = residual.blocks[1].attention
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(4))
    first = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(5))
    v = attention.qkv(x)[..., 64:].view(2, 16, 2, 16).transpose(1, 2)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(attention.values(x), v)  # type: ignore[operator, union-attr]
    with torch.no_grad():
        attention.mix.copy_(torch.tensor([0.0, 1.0]))  # type: ignore[operator, union-attr]
    assert torch.equal(attention(x, first=first), attention(x + 0, first=first))  # type: ignore[operator]
    with torch.no_grad():
        attention.qkv.weight[64:] = 0  # type: ignore[union-attr, index, operator]
        attention.qkv.bias[64:] = 0  # type: ignore[union-attr, index, operator]
    ones = torch.ones(2, 2, 16, 16)
    torch.testing.assert_close(attention(x, first=ones), attention.out(torch.ones(2, 16, 32)))  # type: ignore[operator, union-attr]


def test_no_block_between() -> None:
    with pytest.raises(ValueError, match="no block lies between the first 2 and the last 2 of 4"):
        DiT(**MODERN, route=0.5, route_from=2, route_until=2)  # type: ignore[arg-type]
    assert DiT(**MODERN, route_from=2, route_until=2).inner == range(2, 2)  # type: ignore[arg-type]
