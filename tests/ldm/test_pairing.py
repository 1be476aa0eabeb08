"""Exact assignment and what it does to the noise of a batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import F64

from ldm.conditioning import Cond
from ldm.diffusion import Diffusion
from ldm.noise import Noise
from ldm.objectives import Denoising
from ldm.pairing import PAIRINGS, Independent, MinibatchOT, Pairing, assignment
from ldm.predictions import Velocity
from ldm.schedules import Flow
from ldm.times import Uniform
from ldm.weighting import Uniform as Plain


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
    process = {"diffusion": Diffusion(schedule=Flow(), prediction=Velocity()), "times": Uniform(), "weighting": Plain()}
    plain = Denoising(**process)(network, x0, nothing, noise)  # type: ignore[arg-type]
    paired = Denoising(**process, pairing=MinibatchOT())(network, x0, nothing, noise)  # type: ignore[arg-type]
    assert paired.mean() < plain.mean()
    eps = MinibatchOT()(x0, noise.normal((4,), "eps"))
    t = seen[1][1].float()[:, None] / 1000
    torch.testing.assert_close(seen[1][0], (1 - t) * x0 + t * eps)
    assert Independent()(x0, eps) is eps
