"""Guidance by several conditions, each with its own weight, in one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.composition import composed
from ldm.conditioning import Cond
from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.exact import F64, scalar
from ldm.guidance import ClassifierFree
from ldm.predictions import X0
from ldm.schedules import EDM


class Network:
    """Any function of x and the condition; records the batch of each call."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        self.batches.append(len(x))
        return torch.tanh(x + cond.context[:, 0].to(x.dtype))


def told(flag: float, batch: int) -> Cond:
    return Cond(torch.full((batch, 1, 1), flag), torch.ones(batch, 1, dtype=torch.bool))


def counted() -> tuple[Network, Denoiser]:
    network = Network()
    return network, Denoiser(network, Diffusion(schedule=EDM(), prediction=X0()))


def test_composed_guidance_of_one_condition_is_classifier_free() -> None:
    network, denoiser = counted()
    x, t = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(8)), scalar(0.02)
    got = composed(denoiser, [(told(1, 3), 2.5)], told(0, 1))(x, t)
    assert network.batches == [6]
    torch.testing.assert_close(got.x0, ClassifierFree(scale=2.5)(denoiser, told(1, 3), told(0, 1))(x, t).x0)


def test_each_condition_has_its_own_weight_in_one_call() -> None:
    network, denoiser = counted()
    x, t = torch.randn(2, 4, dtype=F64, generator=torch.Generator().manual_seed(9)), scalar(0.02)
    plain = {flag: denoiser(x, t, told(flag, 2)) for flag in (1.0, 0.7, 0.2, 0.0)}
    network.batches.clear()
    parts = [(told(1, 2), 2.0), (told(0.7, 2), 1.5), (told(0.2, 2), -0.5), (told(0.4, 2), 0.0)]
    got = composed(denoiser, parts, told(0, 1))(x, t)
    assert network.batches == [8]
    for index in (0, 1):
        none = plain[0.0][index]
        expected = none + sum(w * (plain[f][index] - none) for f, w in ((1.0, 2.0), (0.7, 1.5), (0.2, -0.5)))
        torch.testing.assert_close(got[index], expected)
    alpha, sigma = EDM()(t)
    torch.testing.assert_close(alpha * got.x0 + sigma * got.eps, x)


def test_weights_that_sum_to_one_never_call_the_null() -> None:
    network, denoiser = counted()
    x, t = torch.ones(2, 1, dtype=F64), scalar(0.02)
    composed(denoiser, [(told(1, 2), 0.25), (told(0.5, 2), 0.75)], told(0, 1))(x, t)
    composed(denoiser, [(told(1, 2), 1.0)], told(0, 1))(x, t)
    assert network.batches == [4, 2]
    for wrong in ([], [(told(1, 2), 1.0), (told(1, 3), 1.0)]):
        with pytest.raises(ValueError, match="batch size"):
            composed(denoiser, wrong, told(0, 1))
