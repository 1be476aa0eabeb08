"""Nothing on the way from noise to a sample makes the host wait for a GPU but what says so."""

from __future__ import annotations

import pytest
import torch
from looping import each
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Denoise, Denoiser
from ldm.diffusion import Diffusion
from ldm.exact import Counted, Isotropic, Smooth
from ldm.grids import Uniform
from ldm.guidance import GUIDANCES, ByClassifier, ClassifierFree, Projected
from ldm.guiding import Guidance, Helpers
from ldm.likelihood import log_likelihood
from ldm.noise import Noise
from ldm.predictions import Velocity
from ldm.samplers import DDIM, SAMPLERS, DDIMInversion, Heun, Memory, Sampler, prior, sample
from ldm.samplers.adaptive import Embedded
from ldm.schedules import SCHEDULES, VP, Flow, NoiseSchedule
from training.benchmarks.meters import Waits, waits

FIXED: list[Sampler] = [cls() for cls in SAMPLERS if not issubclass(cls, Embedded)]
PAIRS: list[Sampler] = [cls() for cls in SAMPLERS if issubclass(cls, Embedded)]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Reads(DDIM):
    """Looks at its x, as no sampler should."""

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory,
             noise: Noise) -> tuple[Tensor, Memory]:
        return super().step(denoise, x / x.std().item(), t, s, memory, noise)


class Copies(DDIM):
    """Brings a number of its own to the device."""

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory,
             noise: Noise) -> tuple[Tensor, Memory]:
        return super().step(denoise, x * torch.ones(1).to(x.device), t, s, memory, noise)


class Masks(DDIM):
    """Picks elements of its x by their values."""

    def step(self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Memory,
             noise: Noise) -> tuple[Tensor, Memory]:
        return super().step(denoise, x + x[x > 0].sum(), t, s, memory, noise)


def test_a_sampler_that_waits_is_found_out() -> None:
    assert waits(Reads(), 4) == ["a value is read"] * 4 and waits(Copies(), 4) == ["aten._to_copy.default"] * 4
    with pytest.raises(NotImplementedError):
        waits(Masks(), 4)


@pytest.mark.parametrize("sampler", FIXED, ids=repr)
def test_no_sampler_waits(sampler: Sampler) -> None:
    assert waits(sampler, 6) == []


@pytest.mark.parametrize("sampler", PAIRS, ids=repr)
def test_an_adaptive_pair_waits_once_a_trial(sampler: Embedded) -> None:
    """Here every trial is accepted: one a step. With values, each of its calls but the first belongs to a trial."""
    assert waits(sampler, 6) == ["a value is read"] * 6
    counted, asked = Counted(Isotropic(VP())), list[str]()

    class Told(Tensor):
        """Keeps its type through every operation and counts when its truth is asked for."""

        def __bool__(self) -> bool:
            asked.append("bool")
            return bool(self.as_subclass(Tensor))

    x = torch.tensor([[0.3], [-2.0]], dtype=torch.float64).as_subclass(Told)
    sample(sampler, counted, x, Uniform()(2, VP()), Noise.from_seeds([0, 1]))
    assert len(asked) == (len(counted.times) - 1) / (len(sampler.pair.nodes) - 1) > 2


def guided(guidance: Guidance, schedule: NoiseSchedule, device: str) -> Denoise:
    """A toy network that hears its condition, guided with all that a guidance may ask for."""
    diffusion = Diffusion(schedule=schedule, prediction=Velocity())

    def network(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        told = cond.context[:, 0, 0] + level.float() / 1000
        return torch.tanh(x + told.view(-1, 1, 1, 1))

    denoiser = Denoiser(network, diffusion)
    helpers = Helpers(denoiser, lambda x, t, cond: -x.square().flatten(1).sum(1))
    return guidance(denoiser, told(1, 2, device), told(0, 1, device), helpers)


def told(flag: float, batch: int, device: str) -> Cond:
    mask = torch.ones(batch, 1, dtype=torch.bool, device=device)
    return Cond(torch.full((batch, 1, 1), flag, device=device), mask)


GUIDED: list[Guidance] = [
    *(cls(strength=2.0) if cls is ByClassifier else cls(scale=3.0) for cls in GUIDANCES),  # type: ignore[call-arg]
    ClassifierFree(scale=3.0, rescale=0.5, interval=(0.2, 0.8)),
    Projected(scale=3.0, max_norm=0.5),
]


@pytest.mark.parametrize("guidance", GUIDED, ids=repr)
@each("schedule", [cls() for cls in SCHEDULES])
def test_no_guidance_and_no_denoiser_waits(guidance: Guidance, schedule: NoiseSchedule) -> None:
    denoise = guided(guidance, schedule, "meta")
    noise, grid = Noise.from_seeds([0, 1], "meta"), Uniform()(3, schedule)
    x = prior(schedule, (3, 4, 4), noise)
    with Waits() as waiting:
        sample(Heun(), denoise, x, grid, noise)
    assert waiting.found == []


def test_neither_inversion_nor_the_likelihood_waits() -> None:
    noise, grid = Noise.from_seeds([0, 1], "meta"), Uniform()(3, Flow())
    x = prior(Flow(), (2, 2), noise)
    with Waits() as waiting:
        sample(DDIMInversion(), Smooth(Flow()), x, grid.flip(0), noise)
        log_likelihood(Smooth(Flow()), x, grid, noise)
        log_likelihood(Smooth(Flow()), x, grid)
    assert waiting.found == []


@on_a_gpu
@pytest.mark.parametrize("sampler", FIXED, ids=repr)
def test_cuda_sees_no_synchronisation_in_a_sampler(sampler: Sampler) -> None:
    walk_on_cuda(sampler, Smooth(Flow()))


@on_a_gpu
@pytest.mark.parametrize("guidance", GUIDED, ids=repr)
def test_cuda_sees_no_synchronisation_in_a_guidance(guidance: Guidance) -> None:
    walk_on_cuda(Heun(), guided(guidance, Flow(), "cuda"))


def walk_on_cuda(sampler: Sampler, denoise: Denoise) -> None:
    noise, grid = Noise.from_seeds([0, 1], "cuda"), Uniform()(6, Flow())
    x = prior(Flow(), (3, 4, 4), noise)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(sampler, denoise, x, grid, noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")
