"""Critically damped Langevin against closed forms: transition, covariance, score, ODE and sampler on a Gaussian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.critically_damped import CriticallyDamped, Phase, normal
from ldm.exact import F64
from ldm.noise import Noise

CLD = CriticallyDamped()
STD = 0.5
TIMES = torch.tensor([0.1, 0.25, 0.5, 1.0], dtype=F64)


def at(t: float) -> Tensor:
    return torch.tensor(t, dtype=F64)


def exact(here: Phase, t: Tensor) -> Tensor:
    """The score in v of N(0, STD^2) noised."""
    inverse = torch.linalg.inv(CLD.covariance(t, STD**2))
    return -(inverse[1, 0] * here.x + inverse[1, 1] * here.v)


def drift(cld: CriticallyDamped) -> Tensor:
    return cld.beta * torch.tensor([[0, 1 / cld.mass], [-1, -2 * cld.mass**-0.5]], dtype=F64)


def test_the_handbooks_numbers() -> None:
    """And both of x and v at once: times have a dimension of their own."""
    wanted = [[0.808792, 0.718926], [0.406006, 0.541341], [0.091578, 0.146525], [0.003019, 0.005367]]
    torch.testing.assert_close(CLD.transition(TIMES)[:, 0], torch.tensor(wanted, dtype=F64), rtol=0, atol=5e-7)
    for of_x, entries in ((0.0, (0.764827, 0.072530, 0.227289)), (STD**2, (0.806037, 0.058793, 0.231868))):
        (xx, xv), (vx, vv) = CLD.covariance(at(0.25), of_x).tolist()
        assert (xx, xv, vv) == pytest.approx(entries, abs=5e-7) and xv == vx
    torch.testing.assert_close(CLD.covariance(at(5.0)), torch.tensor([[1, 0], [0, 0.25]], dtype=F64))
    torch.testing.assert_close(CLD.covariance(at(0.0), 2.0), torch.tensor([[2, 0], [0, 0.01]], dtype=F64))


@pytest.mark.parametrize("cld", [CLD, CriticallyDamped(mass=0.6, start=0.3, beta=2.5)], ids=["paper", "other"])
def test_transition_and_covariance_solve_the_process(cld: CriticallyDamped) -> None:
    """The exponential of its drift; and Lyapunov's equation, by central differences."""
    a = drift(cld)
    torch.testing.assert_close(cld.transition(TIMES), torch.linalg.matrix_exp(TIMES[:, None, None] * a))
    eigenvalues = torch.linalg.eigvals(a)
    assert eigenvalues.imag.abs().max() < 1e-6 and (eigenvalues.real + cld.beta * cld.mass**-0.5).abs().max() < 1e-6
    push = torch.tensor([[0, 0], [0, 4 * cld.mass**0.5 * cld.beta]], dtype=F64)
    for t in TIMES:
        slope = (cld.covariance(t + 1e-5, 0.7) - cld.covariance(t - 1e-5, 0.7)) / 2e-5
        here = cld.covariance(t, 0.7)
        torch.testing.assert_close(slope, a @ here + here @ a.T + push, rtol=1e-7, atol=1e-7)


def test_noise_is_that_of_the_covariance_and_its_score_that_of_the_density() -> None:
    noise = Noise.from_seeds(range(40_000))
    x0, eps = torch.full((40_000, 1), 3.0, dtype=F64), normal((1,), noise, F64)
    noised = CLD.perturb(x0, eps, at(0.25))
    both = torch.cat(noised, 1)
    torch.testing.assert_close(both.mean(0), 3 * CLD.transition(at(0.25))[:, 0], rtol=0, atol=0.02)
    torch.testing.assert_close(both.T.cov(), CLD.covariance(at(0.25)), rtol=0, atol=0.01)
    free = both[:5].clone().requires_grad_()
    density = torch.distributions.MultivariateNormal(3 * CLD.transition(at(0.25))[:, 0], CLD.covariance(at(0.25)))
    (slope,) = torch.autograd.grad(density.log_prob(free).sum(), free)
    torch.testing.assert_close(CLD.score(eps.v[:5], at(0.25)), slope[:, 1:])
    each = at(0.25).expand(5)  # a time of its own for each sample
    again = CLD.perturb(x0[:5], Phase(eps.x[:5], eps.v[:5]), each)
    torch.testing.assert_close(again.v, noised.v[:5])
    torch.testing.assert_close(CLD.score(eps.v[:5], each), slope[:, 1:])


def test_the_loss_is_least_at_the_score_of_the_data() -> None:
    """Of linear answers a x + b v, the best is the exact score, whose v at the start was never seen."""
    noise, t = Noise.from_seeds(range(100_000)), at(0.1)
    x0, eps = STD * noise.normal((1,), "data", dtype=F64), normal((1,), noise, F64)
    here = CLD.perturb(x0, eps, t)
    best = torch.linalg.lstsq(torch.cat(here, 1), eps.v).solution
    predicted = torch.cat(here, 1) @ best
    losses = CLD.loss(predicted, eps)
    assert losses.shape == (100_000,) and losses.mean() < CLD.loss(0 * eps.v, eps).mean()
    assert losses[0] == (predicted - eps.v)[0].square()
    found, wanted = CLD.score(predicted, t), exact(here, t)
    assert (found - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def test_the_ode_has_the_same_marginals() -> None:
    """Its linear map, by RK4 over the whole way, takes the covariance at t = 1 to that of the data."""
    unit = Phase(*torch.eye(2, dtype=F64)[:, :, None])
    here, steps = unit, 400
    for i in range(steps, 0, -1):
        t, h = at(i / steps), -1 / steps

        def slope(where: Phase, time: Tensor) -> Phase:
            return CLD.velocity(where, exact(where, time))

        def ahead(k: Phase, share: float, of: Phase = here) -> Phase:
            return of.plus(Phase(share * k.x, share * k.v))

        k1 = slope(here, t)
        k2 = slope(ahead(k1, h / 2), t + h / 2)
        k3 = slope(ahead(k2, h / 2), t + h / 2)
        k4 = slope(ahead(k3, h), t + h)
        here = ahead(Phase(*(a + 2 * b + 2 * c + d for a, b, c, d in zip(k1, k2, k3, k4, strict=True))), h / 6)
    by = torch.cat(here, 1).T
    torch.testing.assert_close(by @ CLD.covariance(at(1.0), STD**2) @ by.T, CLD.covariance(at(0.0), STD**2),
                               rtol=1e-4, atol=2e-4)  # fmt: skip


def spread(steps: int, count: int = 4000) -> float:
    """How far the standard deviation of x is off, drawn in so many steps down to t = 0."""
    noise = Noise.from_seeds(range(count))
    start = CLD.prior((32,), noise, F64)
    drawn = CLD.sample(exact, start, torch.linspace(1, 0, steps + 1, dtype=F64) ** 2, noise)
    return drawn.x.std().item() - STD


def test_the_sampler_draws_the_data() -> None:
    """Nearer with more steps, by about their number; and what the process ends in, in one."""
    coarse, fine = spread(20), spread(80)
    assert abs(fine) < 0.01 and 3 < coarse / fine < 6
    noise = Noise.from_seeds(range(4000))
    start = CLD.prior((32,), noise, F64)
    assert torch.cat(start, 1).T.cov().diag()[::32].tolist() == pytest.approx([1, 0.25], rel=0.1)
    drawn = CLD.sample(lambda here, t: -here.v / CLD.mass, start, torch.tensor([1.0, 0.0], dtype=F64), noise)
    pairs = torch.stack([drawn.x.flatten(), drawn.v.flatten()])
    torch.testing.assert_close(pairs.cov(), torch.tensor([[1, 0], [0, 0.25]], dtype=F64), rtol=0, atol=0.012)
    moved = torch.stack([start.x.flatten(), drawn.x.flatten()]).corrcoef()[0, 1].item()
    assert moved == pytest.approx(CLD.transition(at(1.0))[0, 0].item(), abs=0.01)  # not the start itself


def test_seeds_alone_decide() -> None:
    one, two = (Noise.from_seeds(seeds) for seeds in ([3, 4], [4]))
    times = torch.linspace(1, 0, 5, dtype=F64)
    drawn = [CLD.sample(exact, CLD.prior((2,), noise, F64), times, noise) for noise in (one, two)]
    assert torch.equal(drawn[0].x[1:], drawn[1].x)


def test_what_cannot_be_asked_is_said() -> None:
    noise = Noise.from_seeds([1])
    for times in ([1.0], [0.0, 1.0]):
        with pytest.raises(ValueError, match="strictly decreasing"):
            CLD.sample(exact, CLD.prior((1,), noise, F64), torch.tensor(times, dtype=F64), noise)
    with pytest.raises(ValueError, match="critically-damped mass must be positive, got 0"):
        CriticallyDamped(mass=0)
