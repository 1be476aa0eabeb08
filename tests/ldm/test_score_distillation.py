"""Score distillation against closed forms: its gradient, its mean, and where it leads."""

from __future__ import annotations

import pytest
import torch
from few_step import Data, Exact, at, nothing, values
from torch import Tensor

from ldm.conditioning import Cond
from ldm.denoiser import Conditional
from ldm.diffusion import Denoised
from ldm.exact import F64
from ldm.guidance import ClassifierFree
from ldm.noise import Noise
from ldm.schedules import VP, Flow, NoiseSchedule, match
from ldm.score_distillation import score_distillation, surrogate
from ldm.teacher import Teacher

FLOW = Flow(t_min=0.0)
HALF = Exact(Data(FLOW))


def gradient(x: Tensor, denoiser: Conditional, t: Tensor, eps: Tensor, weight: Tensor | None = None) -> Tensor:
    """That of the losses' sum in x."""
    free = x.clone().requires_grad_()
    losses = score_distillation(free, denoiser, nothing(len(x)), t, eps, weight)
    assert losses.shape == (len(x),) and losses.dtype == torch.float32
    (found,) = torch.autograd.grad(losses.sum(), free)
    return found


def test_the_surrogate_has_the_gradient_that_it_is_given() -> None:
    """To the last bit, however small beside x; a derivative of the gradient itself does not enter."""
    x = torch.tensor([[1e6, -3.0], [0.5, 2.0]], dtype=F64, requires_grad=True)
    pull = torch.tensor([[1e-9, 0.25], [-2.0, 4.0]], dtype=F64) * (x / x.detach())
    losses = surrogate(x, pull)
    assert losses.tolist() == [0.03125, 10]
    (found,) = torch.autograd.grad(losses.sum(), x)
    assert found.tolist() == [[1e-9, 0.25], [-2, 4]]
    assert surrogate(x, pull * torch.nan).isnan().all()


@pytest.mark.parametrize("schedule", [FLOW, VP()], ids=repr)
def test_the_gradient_is_the_weighted_error_of_the_noise(schedule: NoiseSchedule) -> None:
    """In every element of many, at a time of each sample's own; by default weighed by sigma^2."""
    data, noise = Data(schedule, 0.5, 0.3), Noise.from_seeds(range(4))
    x, eps = (noise.normal((3, 2, 2), key, dtype=F64) for key in ("x", "eps"))
    t, weight = at(0.2, 0.4, 0.6, 0.9), at(1, 0.5, 2, 0)
    alpha, sigma = (match(part, x) for part in schedule(t))
    off = data.denoised(alpha * x + sigma * eps, t).eps - eps
    torch.testing.assert_close(gradient(x, Exact(data), t, eps), sigma**2 * off, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(x, Exact(data), t, eps, weight), match(weight, x) * off, rtol=1e-12, atol=1e-12)
    one = torch.tensor(0.4, dtype=F64)  # and of one time and weight for all
    each = one.expand(4)
    assert torch.equal(gradient(x, Exact(data), one, eps, one), gradient(x, Exact(data), each, eps, each))


def test_no_jacobian_and_no_gradient_of_the_network() -> None:
    class Learned(Exact):
        weight = torch.ones((), dtype=F64, requires_grad=True)

        def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
            assert not torch.is_grad_enabled()
            return self.data.denoised(x * self.weight, t)

    seen = Learned(HALF.data)
    assert torch.equal(gradient(values(1), seen, at(0.4), values(0.3)), gradient(values(1), HALF, at(0.4), values(0.3)))
    assert seen.weight.grad is None


def test_its_mean_is_the_gradient_of_a_divergence() -> None:
    """E[eps_hat - eps] is .96 at x = 1 on N(0, .25), alpha .6, sigma .4: sigma / alpha times d/dx of
    KL(N(alpha x, sigma^2) || N(0, V)) = alpha^2 x^2 / (2 V) + ..., V = .25."""
    both = gradient(values(1, 1), HALF, at(0.4, 0.4), values(1.7, -1.7), at(1, 1))  # linear in eps: its mean is exact
    assert both.mean().item() == pytest.approx(0.96, abs=1e-12)
    assert both.mean().item() == pytest.approx(0.4 / 0.6 * 0.6**2 / 0.25, abs=1e-12)
    many = Noise.from_seeds(range(1 << 14)).normal((1,), "eps", dtype=F64)
    ones = torch.ones_like(many)
    found = gradient(ones, HALF, ones[:, 0] * 0.4, many, ones[:, 0])
    assert found.mean().item() == pytest.approx(0.96, abs=0.01)


class Modes(Conditional):
    """Even parts of N(-1, .1^2) and N(1, .1^2)."""

    schedule = FLOW

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
        alpha, sigma = (match(part, x) for part in FLOW(t))
        ends = [Data(FLOW, 0.1, mean).denoised(x, t) for mean in (-1, 1)]
        second = torch.sigmoid(2 * alpha * x / ((alpha * 0.1) ** 2 + sigma**2))
        return Denoised(*((1 - second) * a + second * b for a, b in zip(ends[0][:2], ends[1][:2], strict=True)))


@pytest.mark.parametrize(("denoiser", "ends"), [(HALF, [0.0]), (Modes(), [-1.0, 1.0])], ids=["one", "two"])
def test_it_seeks_modes(denoiser: Conditional, ends: list[float]) -> None:
    """From a spread wider than the data's all that is left is where their density is greatest: that is no sampling."""
    count, steps = 64, 300
    x = torch.linspace(-2, 2, count, dtype=F64)[:, None].requires_grad_()
    optimiser = torch.optim.Adam([x], betas=(0.9, 0.99))
    for step in range(steps):
        noise = Noise.from_seeds(range(count)).fold(step)
        t, eps = 0.02 + 0.38 * noise.uniform((), "t"), noise.normal((1,), "eps", dtype=F64)
        optimiser.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        optimiser.zero_grad()
        for sign in (1, -1):  # which leaves little of the noise of a step
            score_distillation(x, denoiser, nothing(count), t, sign * eps, torch.ones_like(t)).sum().backward()
        optimiser.step()
    nearest = torch.stack([(x.detach() - end).abs() for end in ends]).min(0).values
    assert nearest.mean() < 0.025 and nearest.max() < 0.08  # of data it is .4, and of two modes .08
    assert [bool(((x - end).abs() < 0.03).any()) for end in ends] == [True] * len(ends)


def test_under_guidance_it_is_the_guided_error() -> None:
    class Told(Exact):
        """N(1, .25) where the condition says 1, N(0, 1) without."""

        def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Denoised:
            told, absent = Data(FLOW, 0.5, 1).denoised(x, t), Data(FLOW, 1, 0).denoised(x, t)
            own = cond.context[:, 0] > 0
            return Denoised(torch.where(own, told.x0, absent.x0), torch.where(own, told.eps, absent.eps))

    null, x, eps, t = nothing(1), values(0.5), values(0.3), at(0.4)
    cond = null._replace(context=torch.ones(1, 1, 1))
    free = x.clone().requires_grad_()
    guided = Teacher(Told(HALF.data), ClassifierFree(scale=3.0), null)
    score_distillation(free, guided, cond, t, eps, at(1)).sum().backward()
    x_t = 0.6 * x + 0.4 * eps
    told, absent = 0.4 * (x_t - 0.6) / 0.25, 0.4 * x_t / 0.52
    assert free.grad is not None
    torch.testing.assert_close(free.grad, absent + 3 * (told - absent) - eps)
