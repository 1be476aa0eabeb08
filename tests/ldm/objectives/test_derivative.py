"""Derivatives along a direction: closed forms, and networks by two methods."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from few_step import at, values
from torch import Tensor

from ldm.backbones import Backbone, DiT, UNet
from ldm.conditioning import Cond
from ldm.exact import F64
from ldm.jumps import SPAN
from ldm.objectives.derivative import along
from ldm.schedules import match

HOW = ("jvp", "finite-difference")


def curve(x: Tensor, t: Tensor) -> Tensor:
    """sin(2 x) t^3."""
    return (2 * x).sin() * match(t**3, x)


@pytest.mark.parametrize(("how", "error"), [("jvp", 1e-14), ("finite-difference", 1e-6)])
def test_a_closed_form(how: str, error: float) -> None:
    """cos(2 x) 2 dx t^3 + sin(2 x) 3 t^2, at both ends of time too."""
    x, dx, t = values(0.3, -1.2, 0.7, 2.0), values(1.5, 0.2, -3.0, 0.4), at(0.5, 1.0, 0.9999, 1e-5)
    value, slope = along(curve, x, t, dx, how, 1e-4)
    torch.testing.assert_close(value, (2 * x).sin() * t[:, None] ** 3, rtol=1e-14, atol=0)
    exact = (2 * x).cos() * 2 * dx * t[:, None] ** 3 + (2 * x).sin() * 3 * t[:, None] ** 2
    torch.testing.assert_close(slope, exact, rtol=error, atol=error)


@pytest.mark.parametrize("t", [0.5, 1.0])
def test_differences_are_of_second_order(t: float) -> None:
    """A step half as long leaves a quarter of the error, in the middle as where all steps go backwards."""
    x, dx = values(0.3), values(1.5)
    exact = along(curve, x, at(t), dx, "jvp", 0)[1]
    first, second = (abs(along(curve, x, at(t), dx, "finite-difference", h)[1] - exact).item() for h in (2e-3, 1e-3))
    assert first / second == pytest.approx(4, rel=0.05)


def test_differences_ask_only_where_networks_answer() -> None:
    def asked(x: Tensor, t: Tensor) -> Tensor:
        assert ((t > 0) & (t <= 1)).all()
        return x

    along(asked, values(1.0, 1.0, 1.0), at(1e-5, 0.99999, 1.0), values(1.0, 1.0, 1.0), "finite-difference", 1e-2)


def test_a_network_whose_level_is_a_logarithm_keeps_its_slope_near_zero() -> None:
    """The step is at most t / 8: 0.5 % off at any t, where a step of 0.0001 would leave the domain."""
    x, t, still = values(1.0), at(2.5e-5), values(0.0)
    _, slope = along(lambda x, t: x * match(t.log(), x), x, t, still, "finite-difference", 1e-4)
    assert slope.item() * 2.5e-5 == pytest.approx(1, abs=6e-3)


SMALL: dict[str, DiT | UNet] = {
    "dit": DiT(width=32, depth=2, heads=2, patch=1, mlp="swiglu", norm="rms", position="rope", qk_norm=True,
               gradient_checkpointing=True),
    "dit-single": DiT(width=32, depth=2, heads=2, conditioning="adaln-single", text="in-context", pooled=False),
    "unet": UNet(channels=(16, 32), attention=(1,), head_dim=8, pooled=True, groups=8, gradient_checkpointing=True),
}


def built(config: DiT | UNet) -> tuple[Backbone, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """A small network in float64 with no zero weights, read at 20 t so that differences in t are exact enough in the
    float32 in which levels are embedded; latents and a direction."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    network = config.build(channels=4, context_dim=24, pooled_dim=20, numbers=(SPAN,)).double().train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.15 * draw(*parameter.shape))
    mask = torch.arange(5)[None] < torch.tensor([5, 2, 3])[:, None]
    cond = Cond(draw(3, 5, 24), mask, draw(3, 20))

    def answer(x: Tensor, t: Tensor) -> Tensor:
        y: Tensor = network(x, 20 * t, cond._replace(extras={SPAN: t - 0.1}))
        return y

    return network, answer, draw(3, 4, 8, 8), draw(3, 4, 8, 8)


@pytest.mark.parametrize("kind", SMALL)
def test_networks_by_both_methods(kind: str) -> None:
    """Attention with masks, rotary positions, normed queries, pooled text and blocks that are computed again."""
    network, answer, x, dx = built(SMALL[kind])
    t = at(0.3, 0.6, 1.0)
    value, exact = along(answer, x, t, dx, "jvp", 0)
    torch.testing.assert_close(value, answer(x, t).detach(), rtol=1e-9, atol=1e-9)
    near = along(answer, x, t, dx, "finite-difference", 1e-3)[1]
    assert ((near - exact).norm() / exact.norm()).item() < 1e-3
    still = along(answer, x, t, torch.zeros_like(dx), "jvp", 0)[1]
    assert (still.norm() / exact.norm()).item() > 0.02  # what comes from t and span alone is no rounding
    assert not value.requires_grad and not exact.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("kind", SMALL)
def test_along_x_alone_to_six_digits(kind: str) -> None:
    _, answer, x, dx = built(SMALL[kind])
    t = at(0.3, 0.6, 1.0)
    exact = along(lambda x, _: answer(x, t), x, t, dx, "jvp", 0)[1]
    central = (answer(x + 1e-5 * dx, t) - answer(x - 1e-5 * dx, t)) / 2e-5
    torch.testing.assert_close(exact, central.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_autocast_changes_neither_it_nor_the_gradient_after_it(kind: str, how: str) -> None:
    """What is learned after it, under autocast and with blocks computed again, reaches every weight."""
    network, _, x, dx = built(SMALL[kind])
    network, x, dx, t = network.float(), x.float(), dx.float(), at(0.3, 0.6, 1.0)
    cond = Cond(torch.zeros(3, 5, 24), torch.ones(3, 5, dtype=torch.bool), torch.zeros(3, 20))

    def answer(x: Tensor, t: Tensor) -> Tensor:
        y: Tensor = network(x, 20 * t, cond._replace(extras={SPAN: t - 0.1}))
        return y

    plain = along(answer, x, t, dx, how, 1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = along(answer, x, t, dx, how, 1e-3)
        loss = (answer(x, t).float() - again[1]).square().mean()
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    torch.autograd.backward(loss)
    unread = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert not unread
