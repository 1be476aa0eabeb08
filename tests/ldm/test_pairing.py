"""Exact assignment and what it does to the noise of a batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.conditioning import Cond
from ldm.diffusion import Diffusion
from ldm.exact import F64
from ldm.noise import Noise
from ldm.objectives import Denoising
from ldm.pairing import PAIRINGS, Independent, MinibatchOT, Pairing, assignment, groups
from ldm.predictions import Velocity
from ldm.schedules import Flow
from ldm.times import UniformTimes
from ldm.weighting import UniformWeight


def cost_of(cost: torch.Tensor, columns: torch.Tensor) -> float:
    return cost[torch.arange(len(cost)), columns].sum().item()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 7), seed=st.integers(0, 10**6), ties=st.booleans())
def test_the_assignment_is_the_best_of_all_permutations(n: int, seed: int, ties: bool) -> None:
    cost = torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    cost = cost.round() if ties else cost
    columns = assignment(cost)
    assert sorted(columns.tolist()) == list(range(n))
    best = min(sum(cost[i, j].item() for i, j in enumerate(p)) for p in itertools.permutations(range(n)))
    assert cost_of(cost, columns) == pytest.approx(best, abs=1e-12)


def test_a_large_assignment_is_optimal_by_its_prices() -> None:
    """Hidden in a random cost, a permutation that is cheaper in every place is found again."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randperm(96, generator=generator)
    cost = torch.rand(96, 96, dtype=F64, generator=generator)
    cost[torch.arange(96), hidden] -= 1
    assert torch.equal(assignment(cost), hidden)


@pytest.mark.parametrize("pairing", [cls() for cls in PAIRINGS], ids=repr)
def test_every_pairing_permutes_the_noise_at_no_greater_cost(pairing: Pairing) -> None:
    noise = Noise.from_seeds(list(range(24)))
    x0, eps = noise.normal((2, 3), "data"), noise.normal((2, 3), "eps")
    paired = pairing(x0, eps)
    assert paired.dtype == eps.dtype
    torch.testing.assert_close(paired.flatten(1).sort(0).values, eps.flatten(1).sort(0).values)
    assert (x0 - paired).square().sum() <= (x0 - eps).square().sum()
    if isinstance(pairing, MinibatchOT):
        assert (x0 - paired).square().sum() < 0.9 * (x0 - eps).square().sum()


def test_in_one_dimension_the_pairing_is_monotone() -> None:
    noise = Noise.from_seeds(list(range(30)))
    x0, eps = noise.normal((1,), "data"), noise.normal((1,), "eps")
    paired = MinibatchOT()(x0, eps)
    assert torch.equal(x0.flatten().argsort(), paired.flatten().argsort())


def test_the_objective_trains_on_the_paired_noise() -> None:
    seen = []

    def network(x: torch.Tensor, level: torch.Tensor, cond: Cond) -> torch.Tensor:
        seen.append((x, level))
        return torch.zeros_like(x)

    noise, nothing = Noise.from_seeds(list(range(16))), Cond(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
    x0 = noise.normal((4,), "data")
    process = {"diffusion": Diffusion(schedule=Flow(), prediction=Velocity()), "times": UniformTimes(),
               "weighting": UniformWeight()}
    plain = Denoising(**process)(network, x0, nothing, noise)  # type: ignore[arg-type]
    paired = Denoising(**process, pairing=MinibatchOT())(network, x0, nothing, noise)  # type: ignore[arg-type]
    assert paired.mean() < plain.mean()
    eps = MinibatchOT()(x0, noise.normal((4,), "eps"))
    t = seen[1][1].float()[:, None] / 1000
    torch.testing.assert_close(seen[1][0], (1 - t) * x0 + t * eps)
    assert Independent()(x0, eps) is eps


def cond(flags: torch.Tensor) -> Cond:
    return Cond(flags[:, None, None], torch.ones(len(flags), 1, dtype=torch.bool))


def test_noise_tells_nothing_of_the_condition() -> None:
    """Captions "left" at -2 and "right" at +2: each keeps the noise drawn for it, in the order of its data. Pairing
    over all gives "right" a mean that is far off."""
    sides, captions, off = torch.tensor([-2.0, 2.0]).repeat(8), ["left", "right"] * 8, []
    for step in range(100):
        noise = Noise.from_seeds(list(range(16))).fold(step)
        x0, eps = sides[:, None] + 0.5 * noise.normal((1,), "data"), noise.normal((1,), "eps")
        for told in (captions, cond(sides)):
            paired = MinibatchOT()(x0, eps, told)
            for side in (sides > 0, sides < 0):
                assert torch.equal(paired[side].sort(0).values, eps[side].sort(0).values)
                assert torch.equal(x0[side].flatten().argsort(), paired[side].flatten().argsort())
        off.append((MinibatchOT()(x0, eps) - eps)[sides > 0].mean())
    assert torch.stack(off).mean() > 0.6


def test_conditions_are_equal_in_every_part_that_is_read() -> None:
    same = cond(torch.tensor([1.0, 2.0, 1.0, 1.0]))
    assert groups(same, 4) == [0, 1, 0, 0] and groups(["b", "a", "b"], 3) == [0, 1, 0]
    padding = same.padded(3)._replace(context=torch.cat([same.context, torch.arange(8.0).view(4, 2, 1)], 1))
    assert groups(padding, 4) == [0, 1, 0, 0]
    assert len(set(groups(same._replace(pooled=torch.tensor([[0.0], [0], [1], [0]])), 4))) == 3
    assert len(set(groups(same._replace(extras={"image": torch.arange(4.0)[:, None]}), 4))) == 4
    assert groups(cond(torch.ones(1)), 3) == [0, 0, 0]


def test_pairing_knows_when_there_is_nothing_to_pair() -> None:
    x0, eps = torch.randn(4, 2), torch.randn(4, 2)
    assert torch.equal(MinibatchOT()(x0, eps, ["a", "b", "c", "d"]), eps)
    assert not MinibatchOT().pairs(["a", "b", "c", "d"], 4) and Independent().pairs(["a", "b", "c", "d"], 4)
    assert MinibatchOT().pairs(["a", "b", "a", "d"], 4)
    assert MinibatchOT().pairs(None, 4) and MinibatchOT().pairs(["a"], 1)


def test_labels_pair_as_their_conditions_do() -> None:
    """The numbers of the groups, made once, are the conditions to all that follows."""
    flags = cond(torch.tensor([1.0, 2.0, 1.0, 2.0]))
    labels = MinibatchOT().labels(flags, 4)
    assert labels == ["0", "1", "0", "1"] == MinibatchOT().labels(["b", "a", "b", "a"], 4)
    assert MinibatchOT().labels(None, 4) is None and Independent().labels(flags, 4) is flags
    x0, eps = torch.randn(4, 2), torch.randn(4, 2)
    assert torch.equal(MinibatchOT()(x0, eps, labels), MinibatchOT()(x0, eps, flags))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_costs_that_are_not_finite_are_refused(wrong: float) -> None:
    """A shortest path along NaN has no end."""
    x0 = torch.randn(5, 2)
    x0[3, 1] = wrong
    with pytest.raises(ValueError, match="not finite"):
        MinibatchOT()(x0, torch.randn(5, 2))


def test_the_objective_pairs_among_equal_conditions() -> None:
    noise, flags = Noise.from_seeds(list(range(12))), torch.tensor([0.0, 1.0]).repeat(6)
    x0 = noise.normal((4,), "data")
    rule = Denoising(diffusion=Diffusion(schedule=Flow(), prediction=Velocity()), times=UniformTimes(),
                     weighting=UniformWeight(), pairing=MinibatchOT())
    wanted = MinibatchOT()(x0, noise.normal((4,), "eps"), cond(flags))
    assert torch.equal(rule.draw(x0, noise, cond=cond(flags)).eps, wanted)
    assert not torch.equal(rule.draw(x0, noise).eps, wanted)
    silent = lambda x, level, cond: torch.zeros_like(x)  # noqa: E731
    whole = rule.losses(silent, x0, cond(flags), rule.draw(x0, noise, cond=cond(flags))).total
    assert torch.equal(rule(silent, x0, cond(flags), noise), whole)
