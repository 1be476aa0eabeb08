"""No sampler holds on to more the longer it runs."""

from __future__ import annotations

import gc

import pytest
import torch
from oracles import Smooth

from ldm.grids import Uniform
from ldm.noise import Noise
from ldm.samplers import SAMPLERS, Sampler, Snapshot, prior, sample
from ldm.schedules import Flow

SIZE = (64, 8, 8)


def held() -> int:
    """Tensors as large as a sample that are alive."""
    gc.collect()
    return sum(type(thing) is torch.Tensor and thing.shape == (1, *SIZE) for thing in gc.get_objects())


@pytest.mark.parametrize("sampler", [cls() for cls in SAMPLERS], ids=repr)
def test_nothing_grows_with_the_steps(sampler: Sampler) -> None:
    counts: list[int] = []

    def watch(shot: Snapshot) -> None:
        if shot.step in (7, 8, 9, 22, 23):
            counts.append(held())

    noise, before = Noise.from_seeds([0]), held()
    sample(sampler, Smooth(Flow()), prior(Flow(), SIZE, noise), Uniform()(25, Flow()), noise, watch)
    assert max(counts[3:]) <= max(counts[:3]) < before + 16
