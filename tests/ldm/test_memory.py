"""No sampler holds on to more the longer it runs."""

from __future__ import annotations

import pytest
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.noise import Noise
from ldm.samplers import DDIM, SAMPLERS, Memory, Sampler
from training.benchmarks.meters import holding


@pytest.mark.parametrize("sampler", [cls() for cls in SAMPLERS], ids=repr)
def test_nothing_grows_with_the_steps(sampler: Sampler) -> None:
    early, late = holding(sampler)
    assert late <= early < 16


def test_a_sampler_that_hoards_is_found_out() -> None:
    class Hoard(DDIM):
        def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory,
                 noise: Noise) -> tuple[Tensor, Memory]:
            return super().step(denoise, x, t, s, None, noise)[0], (x, *(memory or ()))

    early, late = holding(Hoard())
    assert late - early == 14
