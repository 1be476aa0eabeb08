"""Measurements: a denoiser that knows y = A x0 + sigma_y n, for every sampler.

Bayes' rule on the score of x_t, with a Gaussian p(x0 | x_t) around the denoiser's x0:

    x0' = x0 + L A^T (A M A^T + sigma_y^2 I)^-1 (y - A x0),    eps' = (x_t - alpha x0') / sigma

    kind        L              M              exact for                derivatives of the network
    ddnm        r^2 I          r^2 I          data N(0, I)             none
    diffpir     r^2/lambda I   r^2/lambda I   data N(0, I), lambda 1   none
    pigdm       Sigma          r^2 I          data N(0, I)             one pass backwards
    dps-bayes   Sigma          0              never                    one pass backwards
    psld        Sigma          0              never; of latents        one pass backwards
    tmpd        Sigma          Sigma          every Gaussian           one pass backwards for each step of its solve

r^2 = sigma^2 / (alpha^2 + sigma^2), and Sigma = (sigma^2 / alpha) dx0/dx_t is the covariance of x0 given x_t, symmetric
where the denoiser is exact; at alpha = 0 it is r^2 I. Text guidance goes inside, a measurement around it. A new one is
a class and an entry in `MEASUREMENTS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.denoiser import Bound, Denoise
from ldm.diffusion import Denoised, dot, with_x0
from ldm.inverse.linearised import Local, conjugate_gradients, leaf_of, linearised
from ldm.inverse.operators import Decoded, LinearOperator, Operator
from ldm.schedules import match

NOISELESS = "divides by sigma_y, which is 0: give the noise of the measurement, or use ddnm, pigdm, diffpir or tmpd"
TRUST = 0.25  # of the squared residual: by how much the operator may bend away from its derivative in one step


class Belief(NamedTuple):
    """p(x0 | x_t) before y: the denoiser's answer, M's scale as () or (B,), and v -> L v."""

    ends: Denoised
    scale: Tensor
    spread: Callable[[Tensor], Tensor]


def by_scale(denoise: Denoise, x: Tensor, t: Tensor, factor: float = 1.0) -> Belief:
    """L = factor r^2 I: the network is only called."""
    alpha, sigma = denoise.schedule(t)
    scale = factor * sigma**2 / (alpha**2 + sigma**2)
    return Belief(denoise(x, t), scale, lambda v: match(scale, v) * v)


def by_jacobian(denoise: Denoise, x: Tensor, t: Tensor) -> Belief:
    """L v = (sigma^2 / alpha) J^T v with J = dx0/dx_t, one pass backwards for each v."""
    alpha, sigma = denoise.schedule(t)
    if denoise.schedule.pure_noise and t == 1:
        return by_scale(denoise, x, t)
    with torch.enable_grad():
        leaf = leaf_of(x)
        ends = denoise(leaf, t)
    factor, x0 = match(sigma**2 / alpha, x), ends.x0

    def spread(v: Tensor) -> Tensor:
        return factor * torch.autograd.grad(x0, leaf, v, retain_graph=True)[0]

    fraction = None if ends.log_var_frac is None else ends.log_var_frac.detach()
    return Belief(Denoised(x0.detach(), ends.eps.detach(), fraction), sigma**2 / (alpha**2 + sigma**2), spread)


class Measurement(Checked, ABC):
    """A rule that moves x0 to what was measured: a frozen dataclass of its settings."""

    def __call__(self, denoise: Denoise, operator: Operator, y: Tensor, sigma_y: float) -> Denoise:
        """`denoise` given y (B, ...) or (1, ...), of noise `sigma_y` >= 0 in y's own units; sample by sample.

        Raises ValueError for a y or sigma_y that does not fit, and for an operator that the kind cannot use.
        """
        if not 0 <= sigma_y < math.inf:
            raise ValueError(f"sigma_y, the noise of a measurement, must be in [0, inf), got {sigma_y}")
        if (reason := self.refusal(operator, sigma_y)) is not None:
            raise ValueError(f"{self.kind} {reason}")
        operator.domain(y)

        def call(x: Tensor, t: Tensor) -> Denoised:
            belief = self.believe(denoise, x, t)
            x0 = belief.ends.x0 + belief.spread(self.pull(belief, operator, y, sigma_y**2))
            return with_x0(belief.ends, x0, denoise.schedule(t))

        return Bound(denoise.schedule, call)

    @abstractmethod
    def refusal(self, operator: Operator, sigma_y: float) -> str | None:
        """Why this kind cannot use these, as the rest of a sentence, with the next step; None where it can."""

    @abstractmethod
    def believe(self, denoise: Denoise, x: Tensor, t: Tensor) -> Belief:
        """What is known of x0 before y."""

    @abstractmethod
    def pull(self, belief: Belief, operator: Operator, y: Tensor, noise: float) -> Tensor:
        """A^T w, of x0's shape and without a graph; `noise` is sigma_y^2."""


@dataclass(frozen=True, kw_only=True)
class Solved(Measurement):
    """w = (A M A^T + sigma_y^2 I)^-1 (y - A x0), for any differentiable operator.

    A linear one is solved in closed form where M is a scalar. Any other is replaced by its derivative at x0', by
    `iterations` of Gauss-Newton from x0 on, each solved by at most `cg_steps` steps of conjugate gradients; a step is
    cut where the operator bends away from its derivative, per sample.
    """

    limits: ClassVar = {"iterations": "[1, inf)", "cg_steps": "[1, inf)"}
    kind: str
    iterations: int = 1
    cg_steps: int = 5

    def refusal(self, operator: Operator, sigma_y: float) -> str | None:
        return None

    def pull(self, belief: Belief, operator: Operator, y: Tensor, noise: float) -> Tensor:
        x0 = belief.ends.x0
        if operator.linear:
            local = linearised(operator, x0, self.cg_steps)
            return local.adjoint(self.solved(local, y - local.value, belief, noise))
        pulled = moved = torch.zeros_like(x0)
        for _ in range(self.iterations):
            local = linearised(operator, x0 + moved, self.cg_steps)
            residual = y - local.value
            newton = local.adjoint(self.solved(local, residual + local.forward(moved), belief, noise)) - pulled
            step = belief.spread(newton)
            bent = operator(x0 + moved + step) - local.value - local.forward(step)
            share = (TRUST * dot(residual, residual) / dot(bent, bent)) ** 0.25
            share = share.nan_to_num(1).clamp(max=1).view(-1, *[1] * (x0.ndim - 1))
            pulled, moved = pulled + share * newton, moved + share * step
        return pulled

    @abstractmethod
    def solved(self, local: Local, residual: Tensor, belief: Belief, noise: float) -> Tensor:
        """w."""


class ByScale(Solved):
    """M is a scalar, the belief's own."""

    def solved(self, local: Local, residual: Tensor, belief: Belief, noise: float) -> Tensor:
        return local.solve(residual, belief.scale, noise)


@dataclass(frozen=True, kw_only=True)
class DDNM(ByScale):
    """The projection x0 + A^+ (y - A x0) where sigma_y is 0, softened by r^2 / sigma_y^2 elsewhere. Wang et al. 2022
    (arXiv 2212.00490), eq. 13 and section 3.3."""

    kind: Literal["ddnm"] = "ddnm"

    def believe(self, denoise: Denoise, x: Tensor, t: Tensor) -> Belief:
        return by_scale(denoise, x, t)


@dataclass(frozen=True, kw_only=True)
class DiffPIR(ByScale):
    """The proximal step argmin |y - A x|^2 / sigma_y^2 + `prior_weight` |x - x0|^2 / r^2, whose solution is `ddnm` with
    r^2 / `prior_weight`, the paper's lambda. Zhu et al. 2023 (arXiv 2305.08995), eq. 13."""

    limits: ClassVar = {**Solved.limits, "prior_weight": "(0, inf)"}
    kind: Literal["diffpir"] = "diffpir"
    prior_weight: float = 7.0

    def believe(self, denoise: Denoise, x: Tensor, t: Tensor) -> Belief:
        return by_scale(denoise, x, t, 1 / self.prior_weight)


@dataclass(frozen=True, kw_only=True)
class PiGDM(ByScale):
    """Pseudo-inverse guidance with noise. Song et al. 2023 (ICLR, "Pseudoinverse-guided diffusion models for inverse
    problems"), eq. 7."""

    kind: Literal["pigdm"] = "pigdm"

    def believe(self, denoise: Denoise, x: Tensor, t: Tensor) -> Belief:
        return by_jacobian(denoise, x, t)


@dataclass(frozen=True, kw_only=True)
class TMPD(Solved):
    """Tweedie moment projection with all of Sigma, by conjugate gradients. Boys et al. 2023 (arXiv 2310.06721)."""

    kind: Literal["tmpd"] = "tmpd"

    def believe(self, denoise: Denoise, x: Tensor, t: Tensor) -> Belief:
        return by_jacobian(denoise, x, t)

    def solved(self, local: Local, residual: Tensor, belief: Belief, noise: float) -> Tensor:
        def apply(w: Tensor) -> Tensor:
            return local.forward(belief.spread(local.adjoint(w))) + noise * w

        return conjugate_gradients(apply, residual, self.cg_steps)


class Descent(Measurement):
    """Sigma times minus the gradient of an error over sigma_y^2 in x0, by automatic differentiation."""

    def believe(self, denoise: Denoise, x: Tensor, t: Tensor) -> Belief:
        return by_jacobian(denoise, x, t)

    def pull(self, belief: Belief, operator: Operator, y: Tensor, noise: float) -> Tensor:
        with torch.enable_grad():
            leaf = leaf_of(belief.ends.x0)
            (gradient,) = torch.autograd.grad(self.error(operator, leaf, y), leaf)
        return -gradient / noise

    @abstractmethod
    def error(self, operator: Operator, x0: Tensor, y: Tensor) -> Tensor:
        """Half the squared error, summed over samples."""


@dataclass(frozen=True, kw_only=True)
class DPSBayes(Descent):
    """Bayes' rule with p(y | x_t) = N(A x0, sigma_y^2 I), as if x0 were known: it counts the measurement too high, and
    an ODE sampler loses the variance. Chung et al. 2023 (arXiv 2209.14687), eq. 16; as published it is the sampler
    `dps`, which does not read sigma_y."""

    kind: Literal["dps-bayes"] = "dps-bayes"

    def refusal(self, operator: Operator, sigma_y: float) -> str | None:
        return None if sigma_y else NOISELESS

    def error(self, operator: Operator, x0: Tensor, y: Tensor) -> Tensor:
        return (y - operator(x0)).square().sum() / 2


@dataclass(frozen=True, kw_only=True)
class PSLD(Descent):
    """`dps-bayes` of latents, and a second error that draws them to where the encoder puts the picture that y corrects:

        omega |y - A D(z)|^2 / 2 + gamma |z - E(A^T y + (I - A^T A) D(z))|^2 / 2

    with decoder D and encoder E. Rout et al. 2023 (arXiv 2307.00619), algorithm 2, in Bayes form: squares over
    sigma_y^2.
    """

    limits: ClassVar = {"omega": "[0, inf)", "gamma": "[0, inf)"}
    kind: Literal["psld"] = "psld"
    omega: float = 1.0
    gamma: float = 0.1

    def refusal(self, operator: Operator, sigma_y: float) -> str | None:
        if not isinstance(operator, Decoded) or operator.encode is None or not operator.operator.linear:
            return ("needs latents with an encoder, and a linear operator of their pictures: ddnm, pigdm, dps-bayes, "
                    "tmpd and diffpir take any operator")
        return None if sigma_y else NOISELESS

    def error(self, operator: Operator, x0: Tensor, y: Tensor) -> Tensor:
        assert isinstance(operator, Decoded) and isinstance(operator.operator, LinearOperator) and operator.encode
        picture = operator.decode(x0)
        residual = y - operator.operator(picture)
        glued = operator.encode(picture + operator.operator.adjoint(residual))
        return (self.omega * residual.square().sum() + self.gamma * (x0 - glued).square().sum()) / 2


MEASUREMENTS = (PiGDM, DDNM, DPSBayes, TMPD, PSLD, DiffPIR)
