from __future__ import annotations

import pytest
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


def seen(batch: int, *names: str) -> Cond:
    extras = {name: torch.arange(batch * 6, dtype=torch.float32).view(batch, 1, 2, 3) + len(name) for name in names}
    return build(batch, 2)._replace(extras=extras)


def test_extras_go_wherever_the_condition_goes() -> None:
    cond = seen(4, "image", "hint")
    picture = cond.image
    assert picture is not None and build(1, 1).image is None
    assert torch.equal(cond.select(torch.tensor([2, 0])).extras["hint"], cond.extras["hint"][[2, 0]])
    assert seen(1, "image").expand(5).extras["image"].shape == (5, 1, 2, 3)
    counted = cond._replace(extras={"level": torch.arange(4)}).to("cpu", torch.bfloat16)
    assert cond.to("cpu", torch.bfloat16).extras["hint"].dtype == torch.bfloat16
    assert counted.extras["level"].dtype == torch.int64
    assert cond.padded(7).extras == cond.extras
    both = Cond.cat([cond, seen(2, "hint", "image")])
    assert both.extras.keys() == {"image", "hint"} and both.extras["image"].shape == (6, 1, 2, 3)
    for other in (build(1, 2), seen(1, "image"), seen(1, "image", "depth")):
        with pytest.raises(ValueError, match="same extras"):
            Cond.cat([cond, other])


def test_an_extra_is_dropped_only_for_one_of_its_name() -> None:
    cond, keep = seen(3, "image", "hint"), torch.tensor([True, False, True])
    null = seen(1, "depth", "hint")._replace(context=-torch.ones(1, 1, 3), mask=torch.ones(1, 1, dtype=torch.bool))
    for mixed, kept in ((cond.where(keep, null), keep), (cond.absence(null), torch.zeros(3, dtype=torch.bool))):
        assert mixed.extras.keys() == {"image", "hint"}
        assert torch.equal(mixed.extras["image"], cond.extras["image"])
        wanted = torch.where(kept.view(3, 1, 1, 1), cond.extras["hint"], null.extras["hint"])
        assert torch.equal(mixed.extras["hint"], wanted)
        assert [bool((row == -1).any()) for row in mixed.context] == (~kept).tolist()
