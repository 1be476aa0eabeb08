from __future__ import annotations

import torch

from ldm.conditioning import Cond


def build(batch: int, length: int, pooled: bool = True) -> Cond:
    context = torch.arange(batch * length * 3, dtype=torch.float32).view(batch, length, 3)
    return Cond(context, torch.ones(batch, length, dtype=torch.bool), torch.ones(batch, 2) if pooled else None)


def test_cat_pads_with_masked_tokens() -> None:
    both = Cond.cat([build(2, 3), build(1, 5)])
    assert both.context.shape == (3, 5, 3) and both.mask.sum(1).tolist() == [3, 3, 5]
    assert both.pooled is not None and both.pooled.shape == (3, 2)
    assert bool((both.context[:2, 3:] == 0).all()) and torch.equal(both.context[2:], build(1, 5).context)
    assert Cond.cat([build(1, 2, False)]).pooled is None


def test_where_drops_captions_for_a_null_of_another_length() -> None:
    cond, null = build(3, 2), Cond(-torch.ones(1, 4, 3), torch.tensor([[True, False, False, False]]), torch.zeros(1, 2))
    mixed = cond.where(torch.tensor([True, False, True]), null)
    assert mixed.mask.tolist() == [[True, True, False, False], [True, False, False, False], [True, True, False, False]]
    assert mixed.pooled is not None and mixed.pooled[:, 0].tolist() == [1, 0, 1]
    assert torch.equal(mixed.context[0, :2], cond.context[0]) and bool((mixed.context[1] == -1).all())


def test_select_expand_and_to() -> None:
    cond = build(4, 2)
    assert torch.equal(cond.select(torch.tensor([2, 0])).context, cond.context[[2, 0]])
    assert cond.select(slice(1, 3)).mask.shape == (2, 2)
    assert build(1, 2).expand(5).context.shape == (5, 2, 3) and build(5, 2, False).expand(5).pooled is None
    moved = cond.to("cpu", torch.bfloat16)
    assert moved.context.dtype == torch.bfloat16 and moved.mask.dtype == torch.bool
