"""A learning rate found at one width, used at another (muP): the rates of each layer, and what they are for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.backbones import DiT
from ldm.backbones.base import share_rates
from ldm.conditioning import Cond
from training.loop import optim
from training.models import assembly
from training.settings import decoding
from training.settings.sections import Optimizer

CONTEXT = 24


def network(width: int, base: int, heads: int = 0) -> torch.nn.Module:
    torch.manual_seed(0)
    config = DiT(width=width, base_width=base, depth=2, heads=heads or width // 16, patch=1, base_size=4, pooled=False)
    wide = config.build(channels=4, context_dim=CONTEXT)
    if config.narrow is not None:
        with torch.device("meta"):
            share_rates(wide, config.narrow.build(channels=4, context_dim=CONTEXT))
    return wide


def test_rates_follow_the_inputs_that_grow() -> None:
    wide = network(64, 16)
    names = {p: name for name, p in wide.named_parameters()}
    for kind, hidden in (("adamw", 0.25), ("muon", 0.5)):
        optimizer = optim.build(Optimizer(matrices=kind), [wide])  # type: ignore[arg-type]
        scales = {names[p]: group["scale"] for group in optimizer.param_groups for p in group["params"]}
        assert scales["blocks.0.attention.qkv.weight"] == scales["blocks.1.mlp.out.weight"] == hidden
        assert scales["blocks.0.cross.kv.weight"] == hidden
        grown = {name for name, scale in scales.items() if scale != 1}
        assert grown == {name for name, p in wide.named_parameters() if p.ndim > 1 and p.shape[1] in (64, 256)
                         and not name.startswith("time_embedding.linear_1")}  # fmt: skip
        assert all(scales[names[p]] == 1 for p in names if p.ndim == 1)


def test_a_training_tells_its_layers_and_a_drawing_builds_one_network() -> None:
    config = decoding.load("denoiser", "smoke", {"backbone.width": "64", "backbone.base_width": "32"})
    codec: Any = SimpleNamespace(latent_channels=4, image_channels=3, factor=4)
    text: Any = SimpleNamespace(context_dim=8, pooled_dim=8)
    drawing, training = (build(config, codec, text) for build in (assembly.backbone_for, assembly.backbone_to_train))
    assert training.get_submodule("blocks.0.attention.qkv").narrower == 0.5
    assert not any(hasattr(layer, "narrower") for layer in drawing.modules())


def test_the_weights_are_those_of_any_other_width() -> None:
    for ours, theirs in zip(network(64, 16).parameters(), network(64, 0).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def moved(width: int, base: int, kind: str, lr: float) -> float:
    """How far six steps at one rate move what the network answers, root mean square over standard targets."""
    net, generator = network(width, base), torch.Generator().manual_seed(1)
    optimizer = optim.build(Optimizer(lr=lr, matrices=kind), [net])  # type: ignore[arg-type]
    optim.set_learning_rate(optimizer, lr)
    x, wanted = torch.randn(2, 16, 4, 4, 4, generator=generator)
    cond, level = Cond(torch.randn(16, 3, CONTEXT, generator=generator), None), torch.linspace(1, 999, 16)
    answers: list[Tensor] = []
    for _ in range(6):
        answers.append(net(x, level, cond))
        (answers[-1] - wanted).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (answers[-1] - answers[0]).square().mean().sqrt().item()


@pytest.mark.parametrize(("kind", "lr"), [("adamw", 2e-3), ("muon", 2e-3)])
def test_steps_of_one_rate_reach_as_far_at_any_width(kind: str, lr: float) -> None:
    """The coordinate check of Yang et al. (2022), appendix D.1."""
    narrow, wide = moved(32, 32, kind, lr), moved(256, 32, kind, lr)
    assert 0.8 < wide / narrow < 1.2
    assert moved(256, 0, kind, lr) / narrow > 1.4


def test_a_base_that_cuts_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="base_width .24. must hold whole heads of 16 channels"):
        network(64, 24)
