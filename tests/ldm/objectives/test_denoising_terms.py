"""What may be added to the squared error of denoising: the direction of the answer, and contrast to other samples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning import Cond
from ldm.diffusion import Diffusion
from ldm.noise import Noise
from ldm.objectives import Denoising
from ldm.objectives.base import Draw
from ldm.objectives.denoising import GROUP, DenoisingConfig
from ldm.pairing import Independent
from ldm.predictions import Velocity
from ldm.schedules import Flow
from ldm.times import UniformTimes
from ldm.weighting import UniformWeight

DIFFUSION = Diffusion(schedule=Flow(), prediction=Velocity())
NOTHING = Cond(torch.zeros(16, 1, 1), torch.ones(16, 1, dtype=torch.bool))
X0 = torch.randn(16, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def answer(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
    return x.roll(1, 1) * 0.7 + 0.1


def objective(**weights: float) -> Denoising:
    config = DenoisingConfig(**weights)
    return config.build(diffusion=DIFFUSION, times=UniformTimes(), weighting=UniformWeight(), pairing=Independent())


def drawn() -> tuple[Denoising, Draw, Tensor, Tensor]:
    plain = objective()
    draw = plain.draw(X0, Noise(torch.arange(16)))
    target = DIFFUSION.target(X0, draw.eps, draw.t)
    return plain, draw, target, answer(DIFFUSION.perturb(X0, draw.eps, draw.t), draw.t, NOTHING)


def test_direction() -> None:
    """1 - cos over the channels of a place: nothing where the answer points as the target does, whatever its length."""
    plain, draw, target, y = drawn()
    cos = torch.stack([torch.stack([F.cosine_similarity(a[:, i, j], b[:, i, j], dim=0) for i in (0, 1) for j in (0, 1)])
                       for a, b in zip(y, target, strict=True)])
    got = objective(direction=2.0).losses(answer, X0, NOTHING, draw).total
    torch.testing.assert_close(got - plain.losses(answer, X0, NOTHING, draw).total, 2 * (1 - cos).mean(1))
    aligned = objective(direction=2.0).losses(lambda *_: 3 * target, X0, NOTHING, draw).total
    torch.testing.assert_close(aligned, plain.losses(lambda *_: 3 * target, X0, NOTHING, draw).total)


def test_contrast_to_the_sample_before_in_the_group() -> None:
    plain, draw, target, y = drawn()
    before = torch.tensor([GROUP - 1, *range(GROUP - 1), 2 * GROUP - 1, *range(GROUP, 2 * GROUP - 1)])
    got = objective(contrastive=0.05).losses(answer, X0, NOTHING, draw).total
    away = (y - target[before]).square().flatten(1).mean(1)
    torch.testing.assert_close(got, plain.losses(answer, X0, NOTHING, draw).total - 0.05 * away)


def test_the_best_answer_is_moved_away_from_what_all_have_in_common() -> None:
    """(y - w E[y']) / (1 - w), for a network that knows each sample: its gradient is zero there."""
    _, draw, target, _ = drawn()
    before = target.view(2, GROUP, *target.shape[1:]).roll(1, 1).flatten(0, 1)
    best = ((target - 0.2 * before) / 0.8).requires_grad_()
    objective(contrastive=0.2).losses(lambda *_: best, X0, NOTHING, draw).total.sum().backward()
    torch.testing.assert_close(best.grad, torch.zeros_like(best), rtol=0, atol=1e-6)


def test_split_in_groups_it_is_the_same_loss() -> None:
    coupled = objective(contrastive=0.05, direction=1.0)
    draw = coupled.draw(X0, Noise(torch.arange(16)))
    whole = coupled.losses(answer, X0, NOTHING, draw).total
    half = [Draw(*(part[rows] for part in draw[:3])) for rows in (slice(GROUP), slice(GROUP, None))]
    parts = [coupled.losses(answer, x, NOTHING, d).total for x, d in zip(X0.split(GROUP), half, strict=True)]
    assert torch.equal(whole, torch.cat(parts))
    assert DenoisingConfig(contrastive=0.1).group == GROUP and DenoisingConfig(direction=1.0).group == 1


def test_validation_knows_neither() -> None:
    plain, draw, _, _ = drawn()
    both = objective(contrastive=0.05, direction=1.0)
    args = answer, X0, NOTHING, draw.t, draw.eps
    assert torch.equal(both.at(*args), plain.at(*args))
    with pytest.raises(ValueError, match="contrastive"):
        DenoisingConfig(contrastive=1.0)
