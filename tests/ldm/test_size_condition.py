"""Backbones that are told how a picture was cut: as before at first, its own size where nothing is told, then by it."""

from __future__ import annotations

import dataclasses

import pytest
import test_pipeline
import torch
from test_backbones import CHANNELS, CONTEXT, POOLED, SMALL, build, inputs
from torch import Tensor

from ldm.backbones import Backbone
from ldm.backbones.embed import sinusoid
from ldm.backbones.image import SizeEmbedding
from ldm.conditioning import Cond

UNIT = 4


def sized(config: str, *, learned: bool = True) -> Backbone:
    """A shaken network that reads sizes; with weights for them that are not zero, where `learned`."""
    plain = build(SMALL[config])
    network = SMALL[config].build(channels=CHANNELS, context_dim=CONTEXT, pooled_dim=POOLED).double()
    network.load_state_dict(plain.state_dict())
    network = network.shown(size_unit=UNIT).double()
    if learned:
        torch.manual_seed(1)
        for parameter in network.size_embedding.projection.linear_2.parameters():
            torch.nn.init.normal_(parameter)
    return network


def told(cond: Cond, *numbers: float) -> Cond:
    return cond._replace(extras={"size": torch.tensor([numbers]).float().expand(len(cond.mask), -1)})


@pytest.mark.parametrize("config", SMALL)
def test_at_first_it_answers_as_one_that_is_told_nothing(config: str) -> None:
    plain, network, (x, level, cond) = build(SMALL[config]), sized(config, learned=False), inputs()
    expected = plain(x, level, cond)
    assert torch.equal(network(x, level, told(cond, 900, 700, 3, 5, 32, 32)), expected)
    own = {name.split(".")[0] for name in network.state_dict().keys() - plain.state_dict().keys()}
    assert own == {"size_embedding"}
    assert set(network.extended(plain.state_dict())) == set(network.state_dict())


@pytest.mark.parametrize("config", SMALL)
def test_what_is_not_told_is_the_size_of_the_latents(config: str) -> None:
    network, (x, level, cond) = sized(config), inputs()
    x = torch.cat([x, x], 2)[:, :, :12] if network.multiple <= 4 else torch.cat([x, x], 2)
    height, width = (UNIT * side for side in x.shape[2:])
    assert height != width
    expected = network(x, level, told(cond, height, width, 0, 0, height, width))
    assert torch.equal(network(x, level, cond), expected)
    assert torch.equal(network(x, level, told(cond, 0, 0, 0, 0, 0, 0)), expected)
    assert torch.equal(network(x, level, told(cond, 0, 0, 7, 0, 0, 0)),
                       network(x, level, told(cond, height, width, 7, 0, height, width)))
    for place in range(6):
        other = [height, width, 0, 0, height, width]
        other[place] += 9
        assert not torch.allclose(network(x, level, told(cond, *other)), expected), place


def test_each_number_has_its_sinusoid() -> None:
    torch.manual_seed(0)
    embedding = SizeEmbedding(16, UNIT)
    torch.nn.init.normal_(embedding.projection.linear_2.weight)
    rows = torch.tensor([[300.0, 200, 7, 1, 64, 48], [64, 64, 2, 5, 32, 96]])
    features = torch.cat([sinusoid(rows[:, i], 256) for i in range(6)], dim=1)
    assert torch.equal(embedding(rows, torch.zeros(2, 3, 4, 4)), embedding.projection(features))


def test_another_shape_is_refused() -> None:
    network, (x, level, cond) = sized(next(iter(SMALL))), inputs()
    with pytest.raises(ValueError, match="the extra 'size' is"):
        network(x, level, told(cond, 1, 2, 3))


def test_a_drawing_tells_what_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Tensor | None] = []

    def listening(self: object, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        heard.append(cond.extras.get("size"))
        return x

    monkeypatch.setattr(test_pipeline.Backbone, "__call__", listening)
    pipe = dataclasses.replace(test_pipeline.pipeline(), sized=True)
    list(pipe.pixels(["a", "b"], 0))
    assert heard and all(extra is None for extra in heard)
    heard.clear()
    plan = dataclasses.replace(pipe.sampling, original_size=(300, 200), crop_offset=(0, 9))
    list(pipe.pixels(["a", "b"], 0, sampling=plan))
    wanted = [300, 200, 0, 9, 0, 0]
    assert heard and all(extra is not None and set(map(tuple, extra.tolist())) == {tuple(wanted)} for extra in heard)
    with pytest.raises(ValueError, match=r"this one reads none: leave them out, or train with conditioning\.size true"):
        dataclasses.replace(pipe, sized=False).pixels(["a"], 0, sampling=plan)
