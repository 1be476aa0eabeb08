"""The averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoencoder.quantizer import Quantizer
from training.loop.ema import EMA


def test_warm_up_and_formula() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    ema, expected = EMA({"net": layer}, 0.9), 1.0
    for n in range(200):
        nn.init.constant_(layer.weight, float(n))
        ema.update()
        expected += (1 - min(0.9, (1 + n) / (10 + n))) * (n - expected)
        assert ema.shadow["net.weight"].item() == pytest.approx(expected, rel=1e-5)
    assert ema.updates == 200


def test_applied_is_undone_even_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    ema = EMA({"net": layer}, 0.9)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    with pytest.raises(RuntimeError), ema.averaged_weights():
        assert torch.equal(layer.weight, before)
        raise RuntimeError
    assert torch.equal(layer.weight, before + 1)


def test_off() -> None:
    layer = nn.Linear(2, 2)
    ema = EMA({"net": layer}, 0.0)
    with torch.no_grad():
        layer.weight.fill_(7)
    with ema.averaged_weights():
        assert (layer.weight == 7).all()


def test_shadows_are_float32_and_frozen_weights_have_none() -> None:
    net = nn.Sequential(nn.Linear(2, 2).to(torch.bfloat16), nn.Linear(2, 2).requires_grad_(False))
    ema = EMA({"net": net}, 0.99)
    assert set(ema.shadow) == {"net.0.weight", "net.0.bias"}
    assert all(shadow.dtype == torch.float32 for shadow in ema.shadow.values())
    with ema.averaged_weights():
        assert net[0].weight.dtype == torch.bfloat16


def test_load() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    saved = EMA({"net": first}, 0.9)
    saved.update()
    other = EMA({"net": second}, 0.9)
    other.load(dict(saved.shadow), saved.updates)
    assert other.updates == 1 and torch.equal(other.shadow["net.weight"], saved.shadow["net.weight"])
    other.update()
    assert not torch.equal(other.shadow["net.weight"], saved.shadow["net.weight"])  # its own memory


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_codes_are_averaged_however_they_move(decay: float) -> None:
    """Those that follow z by averages of their own too, without a gradient; not the counts they follow by."""
    net = nn.Sequential(Quantizer(4, 2, beta=0.25, normalize=False, decay=decay))
    codes, key = net[0].embedding.weight, "net.0.embedding.weight"
    before, ema = codes.detach().clone(), EMA({"net": net}, 0.9)
    assert codes.requires_grad == (not decay) and set(ema.shadow) == {key}
    with torch.no_grad():
        codes.add_(1)
    ema.update()
    torch.testing.assert_close(ema.shadow[key], before + 0.9)
    with ema.averaged_weights():
        torch.testing.assert_close(net[0].lookup(torch.tensor([[[2]]])).flatten(), before[2] + 0.9)
    torch.testing.assert_close(codes.detach(), before + 1)


def test_what_an_earlier_version_did_not_average_is_taken_from_the_weights() -> None:
    net = nn.ModuleList([nn.Linear(2, 2), Quantizer(4, 2, beta=0.25, normalize=False, decay=0.9)])
    ema, key = EMA({"net": net}, 0.9), "net.1.embedding.weight"
    saved = {name: value + 1 for name, value in ema.shadow.items() if name != key}
    with torch.no_grad():
        net[1].embedding.weight.fill_(7)
    ema.load(saved, 3)
    assert (ema.shadow[key] == 7).all() and torch.equal(ema.shadow["net.0.weight"], saved["net.0.weight"])
    del saved["net.0.weight"]
    with pytest.raises(KeyError):
        ema.load(saved, 3)
