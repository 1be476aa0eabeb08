"""The DPM rules: exact on an x0 that is a polynomial in lambda, as far as each claims, and the papers' formulas."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from ldm.diffusion import Denoised
from ldm.exact import F64, fitted_order, gaussian, scalar
from ldm.noise import Noise
from ldm.samplers import DPMpp2M, DPMpp3M, DPMppSDE2M, DPMppSDE3M, DPMSolver2, DPMSolver3, Sampler
from ldm.samplers.multistep import Multistep
from ldm.schedules import EDM, VP, Flow, NoiseSchedule

ONE = Noise.from_seeds([0])
RULES: list[Multistep] = [DPMpp2M(), DPMpp3M(), DPMppSDE2M(), DPMppSDE3M()]


@dataclass
class Polynomial:
    """Answers x0 = sum_k c_k lambda^k, whatever x is."""

    schedule: NoiseSchedule
    coefficients: tuple[float, ...]

    def x0(self, lam: Tensor) -> Tensor:
        return sum((c * lam**k for k, c in enumerate(self.coefficients)), torch.zeros_like(lam))

    def __call__(self, x: Tensor, t: Tensor) -> Denoised:
        (alpha, sigma), x0 = self.schedule(t), self.x0(self.schedule.logsnr(t) / 2).expand_as(x)
        return Denoised(x0, (x - alpha * x0) / sigma)

    def exact(self, x: Tensor, t: Tensor, s: Tensor, rate: int) -> Tensor:
        """x_s = (sigma_s / sigma_t) e^(-(rate - 1) h) x + alpha_s int_0^h rate e^(-rate (h - u)) x0(lambda_t + u) du:
        the ODE at rate 1, the noiseless part of the reverse SDE at rate 2."""
        (_, sigma_t), (alpha, sigma) = self.schedule(t), self.schedule(s)
        lam, h = self.schedule.logsnr(t) / 2, (self.schedule.logsnr(s) - self.schedule.logsnr(t)) / 2
        nodes, weights = (torch.from_numpy(part) for part in leggauss(24))
        u = h / 2 * (1 + nodes)
        integral = (h / 2 * weights * rate * (-rate * (h - u)).exp() * self.x0(lam + u)).sum()
        return (sigma / sigma_t) * (-(rate - 1) * h).exp() * x + alpha * integral


class Silent(Noise):
    """No noise at all."""

    def normal(self, shape: torch.Size, *key: int | str, dtype: torch.dtype = F64) -> Tensor:  # type: ignore[override]
        return torch.zeros(len(self), *shape, dtype=dtype)


def error(rule: Multistep, oracle: Polynomial, lambdas: list[float]) -> float:
    """Of the last of the steps along `lambdas`, those before it only remembered."""
    times = oracle.schedule.time(2 * torch.tensor(lambdas, dtype=F64)).unbind()
    x, memory = torch.full((1, 1), 0.7, dtype=F64), None
    for t, s in pairwise(times):
        moved, memory = rule.step(oracle, x, t, s, memory, Silent(torch.zeros(1, dtype=torch.int64)))
    return (moved - oracle.exact(x, t, s, rule.rate)).abs().item()


@pytest.mark.parametrize("schedule", [EDM(), VP(), Flow()], ids=repr)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_step_is_exact_up_to_its_degree_and_no_further(rule: Sampler, schedule: NoiseSchedule) -> None:
    """Unequal steps. The first is exact on constants, the second of the 3M rules on lines, their third on parabolas;
    the 2M rules take the slope at the middle of the step and are exact on constants alone."""
    walk, polynomial = [-0.9, -0.35, 0.2, 0.55], (0.4, -1.1, 0.8, 0.6)
    bends = rule.kind in ("dpmpp-3m", "dpmpp-sde-3m")
    for steps, degree in [(1, 0), (2, 1 if bends else 0), (3, 2 if bends else 0)]:
        assert error(rule, Polynomial(schedule, polynomial[: degree + 1]), walk[: steps + 1]) < 1e-13
        assert error(rule, Polynomial(schedule, polynomial[: degree + 2]), walk[: steps + 1]) > 1e-4


@pytest.mark.parametrize("rule", [DPMpp2M(), DPMppSDE2M()], ids=repr)
def test_on_a_line_the_2m_rules_err_by_a_twelfth_of_the_cube(rule: Multistep) -> None:
    """alpha slope (rate^2 h^3 / 12 + O(h^4)): what the middle of the step costs, less than their order."""
    oracle, widths = Polynomial(EDM(), (0.4, -1.1)), [0.04, 0.02, 0.01]
    errors = [error(rule, oracle, [-h, 0.0, h]) for h in widths]
    assert errors[-1] == pytest.approx(1.1 * rule.rate**2 * widths[-1] ** 3 / 12, rel=0.02)
    assert fitted_order([1, 2, 4], errors) == pytest.approx(3, abs=0.05)


def test_one_dpm_solver_step_is_the_papers_formula() -> None:
    """DPM-Solver-2 and -3 as they are written, dividing by alpha, for one step on G(.5) under the VP process."""
    schedule, t, s = VP(), scalar(0.6), scalar(0.5)
    lam, h = schedule.logsnr(t) / 2, (schedule.logsnr(s) - schedule.logsnr(t)) / 2

    def at(fraction: float) -> tuple[Tensor, Tensor, Tensor]:
        time = schedule.time(2 * (lam + fraction * h))
        return time, *schedule(time)

    def eps(x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = schedule(time)
        return sigma * x / (alpha**2 / 4 + sigma**2)

    x, ((alpha_t, _), (alpha, sigma)) = torch.tensor([[0.7]], dtype=F64), (schedule(t), schedule(s))
    time, middle, level = at(0.5)
    u = middle / alpha_t * x - level * (h / 2).expm1() * eps(x, t)
    second = alpha / alpha_t * x - sigma * h.expm1() * eps(u, time)
    torch.testing.assert_close(DPMSolver2().step(gaussian(schedule), x, t, s, None, ONE)[0], second)
    r1, r2 = 1 / 3, 2 / 3
    time, middle, level = at(r1)
    slope = eps(middle / alpha_t * x - level * (r1 * h).expm1() * eps(x, t), time) - eps(x, t)
    time, middle, level = at(r2)
    u = middle / alpha_t * x - level * (r2 * h).expm1() * eps(x, t)
    u = u - level * r2 / r1 * ((r2 * h).expm1() / (r2 * h) - 1) * slope
    third = alpha / alpha_t * x - sigma * h.expm1() * eps(x, t) - sigma / r2 * (h.expm1() / h - 1) * (
        eps(u, time) - eps(x, t)
    )
    torch.testing.assert_close(DPMSolver3().step(gaussian(schedule), x, t, s, None, ONE)[0], third)
