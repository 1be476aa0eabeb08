"""Every adapter on every backbone: the base answers as before, none of it moves, and what is the adapter's learns."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ldm.adapters import ADAPTERS, Adapter, AdapterConfig
from ldm.backbones import BACKBONES, Backbone
from ldm.conditioning import Cond
from ldm.text import Scratch, TextEncoder
from training.settings.decoding import decode_stored, load, to_values

KINDS: list[type[AdapterConfig]] = [kind for kind in ADAPTERS if kind.kind != "none"]
KNOWN, NEW = ["a red circle", "a blue square", ""], "a blicket circle"  # of the new word where one is asked for
ROUNDED = {"dora"}  # which start at the base but for rounding
ELSEWHERE = {"t2i-adapter"}  # which begin as published, with features that are not zero


class Base(NamedTuple):
    """A frozen base as a training leaves one: no branch of it is zero."""

    backbone: Backbone
    text: TextEncoder

    def state(self) -> dict[str, Tensor]:
        return {f"{number}.{name}": value.clone() for number, part in enumerate(self)
                for name, value in part.state_dict().items()}


def base(kind: str) -> Base:
    torch.manual_seed(0)
    text = Scratch(width=24, depth=1, heads=2, length=8)
    encoder = text.build(text.vocabulary(KNOWN))
    config = next(config for config in BACKBONES if config.kind == kind)
    backbone = config(**config.small).build(channels=4, context_dim=24, pooled_dim=24)
    with torch.no_grad():
        for parameter in (*backbone.parameters(), *encoder.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return Base(backbone.requires_grad_(False), encoder.requires_grad_(False))


def settings(kind: type[AdapterConfig]) -> AdapterConfig:
    """Its `small` settings; a new word where it asks for `words`."""
    words = {"words": ("blicket",)} if "words" in {field.name for field in fields(kind)} else {}  # type: ignore[arg-type]
    return kind(**{**words, **getattr(kind, "small", {})})


def made(config: AdapterConfig, on: Base, seed: int = 1) -> Adapter:
    torch.manual_seed(seed)
    try:
        return config.build(*on)
    except ValueError as refused:
        pytest.skip(f"not for this base: {refused}")


def answer(adapter: Adapter | None, on: Base, captions: list[str]) -> Tensor:
    """What the backbone says, shown a hint of the config's channels and size where the adapter reads one."""
    generator = torch.Generator().manual_seed(2)
    x, level = torch.randn(len(captions), 4, 8, 8, generator=generator), torch.tensor([3.0, 500.0, 999.0])
    cond: Cond = on.text(captions)
    if adapter is not None and adapter.hint:
        config: Any = getattr(adapter, "config", None)
        side = 8 * getattr(config, "factor", 8)
        image = torch.rand(len(captions), getattr(config, "channels", 3), side, side, generator=generator)
        cond = cond._replace(extras={adapter.hint: image})
    y: Tensor = on.backbone(x, level, cond)
    return y


def train(adapter: Adapter, on: Base, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01, weight_decay=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        answer(adapter, on, [NEW, *KNOWN[1:]]).square().mean().backward()
        optimizer.step()


@pytest.fixture(params=[(kind, backbone.kind) for kind in KINDS for backbone in BACKBONES],
                ids=lambda both: f"{both[0].kind}-{both[1]}")
def case(request: pytest.FixtureRequest) -> tuple[AdapterConfig, str]:
    kind, backbone = request.param
    return settings(kind), backbone


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_each_is_for_some_backbone(kind: type[AdapterConfig]) -> None:
    refusals = []
    for backbone in BACKBONES:
        try:
            settings(kind).build(*base(backbone.kind))
        except ValueError as refused:
            refusals.append(str(refused))
    assert len(refusals) < len(BACKBONES), refusals
    assert all(len(refusal) > 20 for refusal in refusals)


def test_the_start_is_the_base(case: tuple[AdapterConfig, str]) -> None:
    config, on = case[0], base(case[1])
    before, adapter = answer(None, on, KNOWN), made(config, on)
    after = answer(adapter, Base(*adapter.attach(*on)), KNOWN)
    if config.kind in ELSEWHERE:
        assert not torch.equal(after, before)
    elif config.kind in ROUNDED:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6 * before.abs().max().item())
    else:
        assert torch.equal(after, before)


def test_its_own_parameters_learn_and_the_base_stays(case: tuple[AdapterConfig, str]) -> None:
    config, on = case[0], base(case[1])
    adapter, theirs = made(config, on), {p: p.clone() for part in on for p in part.parameters()}
    buffers = {b: b.clone() for part in on for b in part.buffers()}
    own = dict(adapter.named_parameters())
    assert own
    assert not theirs.keys() & set(own.values())
    attached = Base(*adapter.attach(*on))
    train(adapter, attached)
    assert [name for name, p in own.items() if p.grad is None or not p.grad.any()] == []
    assert all(torch.equal(p, before) and p.grad is None for p, before in theirs.items())
    assert all(torch.equal(b, before) for b, before in buffers.items())
    assert dict(adapter.named_parameters()).keys() == own.keys()


def test_strength_0_is_the_base_bit_for_bit(case: tuple[AdapterConfig, str]) -> None:
    config, on = case[0], base(case[1])
    captions = [NEW, *KNOWN[1:]]
    before, adapter = answer(None, on, captions), made(config, on)
    attached = Base(*adapter.attach(*on))
    train(adapter, attached)
    learned = answer(adapter, attached, captions)
    assert not torch.equal(learned, before)
    adapter.strength = 0.0
    assert torch.equal(answer(adapter, attached, captions), before)
    adapter.strength = 1.0
    assert torch.equal(answer(adapter, attached, captions), learned)


def test_what_is_stored_is_all_there_is(case: tuple[AdapterConfig, str]) -> None:
    """The state of one, loaded into another that began otherwise, on a base of its own, gives the same answer."""
    config, on = case[0], base(case[1])
    adapter = made(config, on)
    attached = Base(*adapter.attach(*on))
    train(adapter, attached)
    state = copy.deepcopy(adapter.state_dict())
    fresh = base(case[1])
    other = made(config, fresh, seed=9)
    other.load_state_dict(state)
    captions = [NEW, *KNOWN[1:]]
    assert torch.equal(answer(other, Base(*other.attach(*fresh)), captions), answer(adapter, attached, captions))


def test_it_moves_and_is_set_as_any_module(case: tuple[AdapterConfig, str]) -> None:
    """Built where its base is: on a device without memory it has shapes and takes none."""
    config, on = case[0], base(case[1])
    shapes = {name: p.shape for name, p in made(config, on).named_parameters()}
    adapter = made(config, Base(*(part.to("meta") for part in on)))
    assert {name: p.shape for name, p in adapter.named_parameters()} == shapes
    assert all(isinstance(p, nn.Parameter) and p.is_meta for p in adapter.parameters())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_its_config_comes_back(kind: type[AdapterConfig]) -> None:
    config: Any = load("denoiser", "smoke", {"adapter.kind": f'"{kind.kind}"'})
    assert config.adapter == kind()
    assert decode_stored("denoiser", to_values(config)) == config
