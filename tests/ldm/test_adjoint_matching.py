"""Adjoint matching against closed forms: what it takes for optimal draws p exp(r), in a Gaussian of one dimension."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from few_step import Data
from torch import Tensor

from ldm.adjoint_matching import adjoint_matching, direct, lean_adjoint, matched, mean, spread, walked
from ldm.denoiser import Bound, Denoise
from ldm.diffusion import Denoised
from ldm.exact import F64
from ldm.noise import Noise
from ldm.samplers import DDPM, mix, sample
from ldm.schedules import VP, Flow, NoiseSchedule

FLOW = Flow(t_min=0.0)
DATA = Data(FLOW, std=0.5)


def known(data: Data) -> Denoise:
    return Bound(data.schedule, data.denoised)


def grid(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=F64)


def start(count: int, key: str = "start") -> tuple[Tensor, Noise]:
    noise = Noise.from_seeds(range(count))
    return noise.normal((1,), key, dtype=F64), noise


@dataclasses.dataclass
class Shifted:
    """A denoiser whose mean of each step is moved: what can be learned of a linear reward."""

    base: Denoise
    times: Tensor
    shifts: Tensor

    @property
    def schedule(self) -> NoiseSchedule:
        return self.base.schedule

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        """Its x0 takes all of the shift: of the step's mean as well, on a schedule where alpha_s x0 is in it."""
        ends, i = self.base(x, t), int((self.times == t).nonzero())
        s = self.times[i + 1]
        return ends._replace(x0=ends.x0 + self.shifts[i] / self.schedule(s).alpha)


@pytest.mark.parametrize("schedule", [FLOW, VP()], ids=repr)
def test_steps_are_those_of_the_sampler(schedule: NoiseSchedule) -> None:
    denoise, times = known(Data(schedule)), grid(5)
    (x, noise), (again, _) = start(3), start(3)
    path = walked(denoise, x, times, noise)
    assert len(path) == 6 and torch.equal(path[-1], sample(DDPM(), denoise, again, times, noise))
    for i, (t, s) in enumerate(pairwise(times)):
        z = noise.fold("step", i).normal((1,), dtype=F64)
        torch.testing.assert_close(path[i + 1], mean(denoise, path[i], t, s) + spread(denoise, t, s) * z)
    assert spread(denoise, times[-2], times[-1]) == 0


def test_a_linear_reward_is_exact_in_any_number_of_steps() -> None:
    """Learned, from zero, by the gradient of the loss; then the mean is k Var, and the variance what it was, of the
    steps' own Gaussian: each to rounding."""
    k, times, base = 2.0, grid(6), known(DATA)
    learner = Shifted(base, times, torch.zeros(6, dtype=F64, requires_grad=True))
    x, noise = start(4)
    path = walked(learner, x, times, noise)
    adjoint = lean_adjoint(base, path, times, lambda x: k * x.sum(1))
    assert torch.equal(adjoint[-1], torch.full_like(x, -k)) and not adjoint[0].any()  # memoryless
    for step in range(5):
        scale = spread(base, times[step], times[step + 1]) ** 2 / 2
        losses = adjoint_matching(learner, base, path, adjoint, times, step)
        assert losses.shape == (4,) and losses.dtype == torch.float32
        (slope,) = torch.autograd.grad(losses.mean().double(), learner.shifts)
        with torch.no_grad():  # the loss is a parabola in it: one step of Newton's is at its least
            learner.shifts[step] -= scale * slope[step]
        assert adjoint_matching(learner, base, path, adjoint, times, step).max() < 1e-9
    plainly = walked(base, x, times, noise)
    each = [adjoint_matching(base, base, plainly, adjoint, times, step) for step in (3, 1)]
    together = torch.stack(list(matched(base, base, x, times, noise, lambda x: k * x.sum(1), (3, 1))))
    assert torch.equal(together, torch.stack(each)) and (together > 1e-3).all()
    plain, moved = (moments(one, times) for one in (base, learner))
    torch.testing.assert_close(moved, torch.stack([k * plain[1], plain[1]]), rtol=1e-6, atol=1e-6)


def moments(denoise: Denoise, times: Tensor) -> Tensor:
    """Mean and variance at the end of steps that are linear in x, of N(0, 1) at their start."""
    ends = torch.tensor([[0.0], [1.0]], dtype=F64)
    m, v = torch.tensor(0.0, dtype=F64), torch.tensor(1.0, dtype=F64)
    with torch.no_grad():
        for t, s in pairwise(times):
            zero, one = mean(denoise, ends, t, s)[:, 0]
            m, v = zero + (one - zero) * m, (one - zero) ** 2 * v + spread(denoise, t, s) ** 2
    return torch.stack([m, v])


def test_the_velocity_of_short_steps_is_the_papers() -> None:
    """r = 2 x, s .5, t .4: a is -k alpha s^2 / V = -1.2, the velocity falls by k s^2 t / V = .8, and the mean is .5."""
    times, base = grid(2000), known(DATA)
    x, noise = start(2)
    path = walked(base, x, times, noise)
    adjoint = lean_adjoint(base, path, times, lambda x: 2 * x.sum(1))
    at = int((times - 0.4).abs().argmin())
    assert times[at] == pytest.approx(0.4) and adjoint[at][0].item() == pytest.approx(-1.2, abs=2e-3)
    t, s = times[at], times[at + 1]
    shift = -spread(base, t, s) ** 2 * adjoint[at + 1]  # of the mean, which moves by -2 (v - v_base) ds
    assert (-shift / (2 * (t - s)))[0].item() == pytest.approx(-0.8, abs=3e-3)
    learned = known(dataclasses.replace(DATA, mean=0.5))
    with torch.no_grad():
        off = [mix(FLOW.rates(t), one(path[at], t)) for one in (learned, base)]
        assert (off[0] - off[1])[0].item() == pytest.approx(-0.8, abs=1e-6)
        losses = adjoint_matching(learned, base, path, adjoint, times, at)
        assert losses.max() < 1e-4 * adjoint_matching(base, base, path, adjoint, times, at).min()


def test_a_curved_reward_has_its_optimum_at_the_tilted_data() -> None:
    """r = -2 (x - 1)^2 makes N(.5, .125) of N(0, .25). There the error is 0 in the mean over the learner's own paths,
    at every x: neither its mean nor its slope in x is left. At the base both are."""
    times, base = grid(200), known(DATA)
    tilted = known(Data(FLOW, std=0.125**0.5, mean=0.5))
    left = {}
    for name, learner in {"tilted": tilted, "base": base}.items():
        x, noise = start(20_000, name)
        path = walked(learner, x, times, noise)
        adjoint = lean_adjoint(base, path, times, lambda x: -2 * (x - 1).square().sum(1))
        for step in (50, 100, 150):
            t, s = times[step], times[step + 1]
            b, x = spread(base, t, s), path[step]
            error = (mean(learner, x, t, s) - mean(base, x, t, s)) / b**2 + adjoint[step + 1]
            centred = x - x.mean()
            left[name, step] = error.mean().abs().item(), ((error * centred).mean() / centred.std()).abs().item()
    for step in (50, 100, 150):
        assert max(left["tilted", step]) < 0.02 * left["base", step][0], (step, left)
    assert left["base", 150][1] > 1.5 > 0.04 > left["tilted", 150][1]  # the slope, too


def test_without_a_reward_the_base_stays() -> None:
    times, base, (x, noise) = grid(4), known(DATA), start(3)
    path = walked(base, x, times, noise)
    adjoint = lean_adjoint(base, path, times, lambda x: 0 * x.sum(1))
    assert not torch.cat(adjoint).any()
    assert not any(adjoint_matching(base, base, path, adjoint, times, step).any() for step in range(3))


def test_the_direct_gradient_goes_through_the_last_steps_alone() -> None:
    """Against differences; all steps draw the sampler's own samples."""
    times, base, (x, noise) = grid(5), known(DATA), start(3)

    def worth(shifts: Tensor, last: int) -> Tensor:
        return direct(Shifted(base, times, shifts), x, times, noise, lambda x: -(x - 1).square().sum(1), last)

    shifts = torch.linspace(0.1, 0.3, 5, dtype=F64, requires_grad=True)
    drawn = sample(DDPM(), Shifted(base, times, shifts.detach()), x, times, noise)
    for last in (1, 2, 5):
        torch.testing.assert_close(worth(shifts, last), (drawn - 1).square().sum(1))
        (slope,) = torch.autograd.grad(worth(shifts, last).sum(), shifts)
        away = 1e-6 * torch.eye(5, dtype=F64)
        with torch.no_grad():
            wanted = torch.stack([(worth(shifts + one, 1) - worth(shifts - one, 1)).sum() / 2e-6 for one in away])
        torch.testing.assert_close(slope[-last:], wanted[-last:], rtol=1e-6, atol=1e-7)
        assert not slope[:-last].any()


def test_what_cannot_be_asked_is_said() -> None:
    times, base, (x, noise) = grid(3), known(DATA), start(2)
    path = walked(base, x, times, noise)
    with pytest.raises(ValueError, match="must end at 0, this one does at 0.333"):
        walked(base, x, times[:-1], noise)
    with pytest.raises(ValueError, match="step 2 lands on the data and adds no noise"):
        adjoint_matching(base, base, path, path, times, 2)
    for last in (0, 4):
        with pytest.raises(ValueError, match=f"one of the 3 steps, 1 or more, got {last}"):
            direct(base, x, times, noise, lambda x: x.sum(1), last)
