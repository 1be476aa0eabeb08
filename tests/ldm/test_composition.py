"""Guidance by several conditions, each with its own weight, in one call; and by several means, in any order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import pytest
import torch
from conditional import Exact, cond
from torch import Tensor

from ldm.composition import composed, two_scale
from ldm.conditioning import Cond
from ldm.denoiser import Conditional, Denoiser
from ldm.diffusion import Denoised, Diffusion
from ldm.exact import F64, scalar
from ldm.guidance import ByClassifier, ClassifierFree
from ldm.guiding import Guided, Helpers
from ldm.predictions import X0
from ldm.schedules import EDM, VP, Flow, NoiseSchedule


class Network:
    """Any function of x and the condition; records the batch of each call."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, level: Tensor, condition: Cond) -> Tensor:
        self.batches.append(len(x))
        return torch.tanh(x + condition.context[:, 0].to(x.dtype))


def counted() -> tuple[Network, Denoiser]:
    network = Network()
    return network, Denoiser(network, Diffusion(schedule=EDM(), prediction=X0()))


def test_composed_guidance_of_one_condition_is_classifier_free() -> None:
    network, denoiser = counted()
    x, t = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(8)), scalar(0.02)
    got = composed(denoiser, [(cond(1, 3), 2.5)], cond(0, 1))(x, t)
    assert network.batches == [6]
    torch.testing.assert_close(got.x0, ClassifierFree(scale=2.5)(denoiser, cond(1, 3), cond(0, 1))(x, t).x0)


def test_each_condition_has_its_own_weight_in_one_call() -> None:
    network, denoiser = counted()
    x, t = torch.randn(2, 4, dtype=F64, generator=torch.Generator().manual_seed(9)), scalar(0.02)
    plain = {flag: denoiser(x, t, cond(flag, 2)) for flag in (1.0, 0.7, 0.2, 0.0)}
    network.batches.clear()
    parts = [(cond(1, 2), 2.0), (cond(0.7, 2), 1.5), (cond(0.2, 2), -0.5), (cond(0.4, 2), 0.0)]
    got = composed(denoiser, parts, cond(0, 1))(x, t)
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
    composed(denoiser, [(cond(1, 2), 0.25), (cond(0.5, 2), 0.75)], cond(0, 1))(x, t)
    composed(denoiser, [(cond(1, 2), 1.0)], cond(0, 1))(x, t)
    assert network.batches == [4, 2]
    for wrong in ([], [(cond(1, 2), 1.0), (cond(1, 3), 1.0)]):
        with pytest.raises(ValueError, match="batch size"):
            composed(denoiser, wrong, cond(0, 1))


KNOWN = torch.tensor([[0.3, -0.8]], dtype=F64)


@dataclass(frozen=True)
class Masked(Conditional):
    """The first two numbers of x0 are known."""

    denoiser: Conditional

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        ends, (alpha, sigma) = self.denoiser(x, t, cond), self.schedule(t)
        x0 = torch.cat([KNOWN.expand(len(x), 2), ends.x0[:, 2:]], dim=1)
        return Denoised(x0, (x - alpha * x0) / sigma)


@pytest.mark.parametrize("order", list(permutations(["text", "classifier", "mask"])), ids="-".join)
@pytest.mark.parametrize("schedule", [VP(), EDM(), Flow()], ids=repr)
def test_text_classifier_and_mask_stand_around_each_other_in_any_order(
    order: tuple[str, ...], schedule: NoiseSchedule
) -> None:
    """N(1, 1/4) beside N(0, 1/4) at scale 3 is N(3, 1/4); p(y | x0) ~ e^(2 x0), at strength .6, moves it by .3 more."""

    def log_prob(x: Tensor, t: Tensor, condition: Cond) -> Tensor:
        return 2 * Exact(schedule)(x, t, condition).x0[:, 2:].sum(1)

    denoiser: Conditional = Exact(schedule)
    for wrapper in order:
        if wrapper == "mask":
            denoiser = Masked(denoiser)
        elif wrapper == "text":
            denoiser = Guided(ClassifierFree(scale=3.0), denoiser, cond(0, 1))
        else:
            denoiser = Guided(ByClassifier(strength=0.6), denoiser, None, Helpers(log_prob=log_prob))
    x, guided = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(10)), denoiser.bind(cond(1, 3))
    for t in map(scalar, (0.01, 0.4, 0.9)):
        ends, wanted, (alpha, sigma) = guided(x, t), Exact(schedule)(x, t, cond(3.3, 3)), schedule(t)
        torch.testing.assert_close(ends.x0[:, 2:], wanted.x0[:, 2:])
        torch.testing.assert_close(ends.x0[:, :2], KNOWN.expand(3, 2))
        torch.testing.assert_close(alpha * ends.x0 + sigma * ends.eps, x)


def test_the_absence_of_a_caption_is_shown_the_same_picture() -> None:
    """Guided and composed: x0 = picture + caption, so that at scale 3 the picture counts once, not three times."""

    class Shown(Exact):
        def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
            assert cond.image is not None
            return Denoised(cond.image + cond.context[:, 0].to(x.dtype), x)

    told = cond(1, 3)._replace(extras={"image": torch.arange(6, dtype=F64).view(3, 2)})
    x, t = torch.zeros(3, 2, dtype=F64), scalar(0.5)
    for guided in (ClassifierFree(scale=3.0)(Shown(Flow()), told, cond(0, 1)),
                   composed(Shown(Flow()), [(told, 3.0)], cond(0, 1))):
        torch.testing.assert_close(guided(x, t).x0, told.extras["image"] + 3)


def test_two_scales_weigh_picture_and_text() -> None:
    """e_none + s_I (e_I - e_none) + s_T (e_IT - e_I), in one call, for the same x."""
    network, denoiser = counted()
    x, t = torch.randn(2, 4, dtype=F64, generator=torch.Generator().manual_seed(11)), scalar(0.02)
    both, picture, none = (denoiser(x, t, cond(flag, 2)) for flag in (1.0, 0.6, 0.0))
    network.batches.clear()
    conds = cond(1, 2), cond(0.6, 2), cond(0, 2)
    got, (alpha, sigma) = two_scale(denoiser, *conds, text_scale=7.5, image_scale=1.5)(x, t), EDM()(t)
    assert network.batches == [6]
    for index in (0, 1):
        wanted = none[index] + 1.5 * (picture[index] - none[index]) + 7.5 * (both[index] - picture[index])
        torch.testing.assert_close(got[index], wanted)
    torch.testing.assert_close(alpha * got.x0 + sigma * got.eps, x)
    assert torch.equal(two_scale(denoiser, *conds, text_scale=1, image_scale=1)(x, t).x0, both.x0)
    assert torch.equal(two_scale(denoiser, *conds, text_scale=0, image_scale=1)(x, t).x0, picture.x0)
    torch.testing.assert_close(two_scale(denoiser, *conds, text_scale=3, image_scale=3)(x, t).eps,
                               ClassifierFree(scale=3.0)(denoiser, conds[0], conds[2])(x, t).eps)
