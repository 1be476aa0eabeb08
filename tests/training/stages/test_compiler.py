"""A step of each stage by torch's real compiler: what it makes learns as what is written does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import autoencoder_steps
import denoiser_steps
import pytest
import torch

from training.errors import UserError
from training.loop.loop import Loop
from training.machine.compiling import check_compiler


def works() -> bool:
    try:
        check_compiler(torch.device("cpu"))
    except UserError:
        return False
    return True


pytestmark = [pytest.mark.compiler, pytest.mark.timeout(1200)]
make_autoencoder, make_denoiser = autoencoder_steps.make, denoiser_steps.make
Make = Callable[..., tuple[Any, Loop]]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    if not works():
        pytest.skip("there is no C++ compiler")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_step_of_a_denoiser(make_denoiser: Make) -> None:
    values, gradients = [], []
    for compiled in ("true", "false"):
        torch.manual_seed(0)
        stage, _ = make_denoiser(train__compile=compiled)
        for parameter in stage.network.backbone.parameters():  # some of which begin as zeros
            torch.nn.init.normal_(parameter, std=0.1)
        values.append(denoiser_steps.step(stage, 0)["loss"])
        gradients.append(torch.cat([g.flatten() for g in denoiser_steps.gradients(stage.network.backbone)]))
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4 * gradients[1].abs().max().item())


def test_a_step_of_an_autoencoder(make_autoencoder: Make) -> None:
    """With the critic at work, whose R1 is taken uncompiled."""
    model = {"channels": [4, 4], "blocks": 1, "groups": 2, "mid_attention": False}
    values, gradients = [], []
    for compiled in ("true", "false"):
        stage, loop = make_autoencoder(model, train__compile=compiled, loss__perceptual="0", loss__r1="0.1",
                                       loss__r1_every="3")  # fmt: skip
        for number in (3, 4):  # with R1, and without; the decoder hears the critic
            values.append(autoencoder_steps.step(stage, loop, number))
        gradients.append(autoencoder_steps.gradients(stage.model))
    for found, expected in zip(values[:2], values[2:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4 * gradients[1].abs().max().item())
