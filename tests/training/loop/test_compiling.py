"""`train.compile`: networks captured whole, a known number of times, that learn what they learn uncompiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import autoencoder_steps
import denoiser_steps
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ldm.backbones.dit import DiT
from ldm.backbones.routing import ROUTE
from ldm.backbones.unet import UNet
from ldm.conditioning import Cond
from ldm.objectives.derivative import along
from training.data.order import Slot
from training.loop.loop import Loop
from training.loop.validation import validate
from training.machine.compiling import GRAPHS, compile_parts
from training.stages.autoencoder import AutoencoderStage

pytestmark = pytest.mark.usefixtures("captured_only")
make_autoencoder, make_denoiser = autoencoder_steps.make, denoiser_steps.make
Make = Callable[..., tuple[Any, Loop]]
BACKBONES = {
    "dit": DiT(width=16, depth=1, heads=2, base_size=8),
    "dit, all its switches": DiT(width=16, depth=3, heads=2, base_size=8, conditioning="adaln-single", position="rope",
                                 qk_norm=True, value_residual=True, mlp="swiglu", route=0.5),
    "dit in context, saving memory": DiT(width=16, depth=1, heads=2, base_size=8, text="in-context",
                                         gradient_checkpointing=True),
    "unet": UNet(channels=(8, 16), attention=(1,), blocks=1, groups=4, heads=2, position=True, query_position=True),
}  # fmt: skip


def captured() -> int:
    """How many graphs there are, none of them broken off."""
    assert not counters["graph_break"] and not counters["unimplemented"]
    assert counters["frames"]["ok"] == counters["frames"]["total"] == counters["stats"]["unique_graphs"]
    return int(counters["frames"]["ok"])


def asked(count: int, sides: tuple[int, int] = (8, 8), *, routed: bool = False) -> tuple[Tensor, Tensor, Cond]:
    extras = {ROUTE: torch.rand(count, sides[0] * sides[1] // 4)} if routed else {}
    cond = Cond(torch.randn(count, 5, 16), torch.rand(count, 5) < 0.7, torch.randn(count, 16), extras)
    return torch.randn(count, 4, *sides), torch.rand(count), cond


def built(config: DiT | UNet) -> Any:
    torch.manual_seed(0)
    network: Any = config.build(channels=4, context_dim=16, pooled_dim=16)
    for parameter in network.parameters():  # some of which begin as zeros
        nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_is_one_graph_for_each_size(name: str) -> None:
    """Of a batch or a picture, however often it comes again; and answers as it does uncompiled."""
    network, routed = built(BACKBONES[name]), "switches" in name
    batches = [asked(4, routed=routed), asked(3, routed=routed), asked(4, (8, 16), routed=routed)]
    expected = [network(*batch) for batch in batches]
    compile_parts([network])
    for _ in range(2):
        for batch, answer in zip(batches, expected, strict=True):
            torch.testing.assert_close(network(*batch), answer, rtol=1e-5, atol=1e-6)
    assert captured() == len(batches)


def test_many_sizes_and_parts_are_all_compiled() -> None:
    """Torch's own limit, which parts of one class share, is 8; beyond it they would go on uncompiled."""
    parts = [nn.Sequential(nn.Linear(width, 1), nn.SiLU()) for width in range(1, 7)]
    compile_parts(parts)
    for count in (2, 3, 4):
        for part in parts:
            part(torch.ones(count, part[0].in_features))
    assert captured() == 18 < GRAPHS


def test_derivatives_of_a_compiled_network_are_its_own() -> None:
    """Forward-mode differentiation captures nothing: what is compiled has no such derivative."""
    network, (x, level, cond) = built(BACKBONES["dit"]), asked(2)
    t, dx = level.double().clamp(min=0.1), torch.randn(2, 4, 8, 8)

    def slopes() -> tuple[Tensor, Tensor]:
        return along(lambda x, t: network(x, t.float(), cond), x, t, dx, "jvp", 0.01)

    expected = slopes()
    compile_parts([network])
    for found, wanted in zip(slopes(), expected, strict=True):
        assert torch.equal(found, wanted)
    assert not counters["frames"]


def test_a_denoiser_learns_what_it_learns_uncompiled(make_denoiser: Make, tmp_path: Path) -> None:
    """With a smaller last micro-batch, which is one graph more; a validation, in float32, is none."""
    flags = {"train__validation_size": "8", "train__ema": "0", "sample__steps": "1", "sample__size": "[32, 32]"}
    losses: list[list[float]] = []
    for compiled in ("false", "true"):
        torch.manual_seed(0)
        stage, loop = make_denoiser(train__compile=compiled, **flags)
        batches = [stage.dataset.__getitems__([Slot(i, 0, i) for i in range(n)]) for n in (8, 5, 8)]
        told = []
        for number, batch in enumerate(batches):
            told.append(stage.backward(batch, number, 1.0)["loss"].item())
            stage.after_backward(number)
            loop.step(number, 1e-2)
        told.append(validate(stage, loop.ema, tmp_path)[0]["loss"])
        losses.append(told)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert captured() == 2


ALL_LOSSES = {"loss__r1": "0.1", "loss__r1_every": "2", "loss__lecam": "0.01", "loss__align": "0.5",
              "loss__align_adaptive": "true", "loss__log_variance": "learned"}  # fmt: skip


def test_an_autoencoder_learns_what_it_learns_uncompiled(make_autoencoder: Make, tmp_path: Path) -> None:
    """With all losses. One graph for each part, and a second of the critic, which sees reconstructions alone and both;
    nothing more for R1, which takes it as it is written, nor for a validation."""
    (stage, loop), (plain, plain_loop) = (make_autoencoder(train__compile=c, **ALL_LOSSES) for c in ("true", "false"))
    for number in range(6):
        found, expected = (autoencoder_steps.step(*pair, number) for pair in ((stage, loop), (plain, plain_loop)))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
        loop.step(number, 1e-4), plain_loop.step(number, 1e-4)
    numbers = [validate(s, each.ema, tmp_path)[0]["psnr"] for s, each in ((stage, loop), (plain, plain_loop))]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
    assert captured() == len(list(stage.compiled_parts())) + 1


def test_r1_of_a_compiled_critic(make_autoencoder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is differentiated ahead of time has no second derivative: R1 takes the critic as it is written."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiled(self, backend="aot_eager", **how))
    monkeypatch.setattr(AutoencoderStage, "compiled_parts", lambda self: [self.discriminator])
    critics = []
    for compiles in ("true", "false"):
        stage, loop = make_autoencoder(train__compile=compiles, loss__perceptual="0", loss__r1="10")
        autoencoder_steps.step(stage, loop, 32)
        critics.append(autoencoder_steps.gradients(stage.discriminator))
    torch.testing.assert_close(critics[0], critics[1], rtol=1e-3, atol=1e-6)
