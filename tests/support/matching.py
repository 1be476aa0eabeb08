"""Distribution matching with exact networks: what makes N(m, s^2) of noise, and denoisers of it."""

from __future__ import annotations

import torch
from few_step import Data, Exact, drawn, network
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor, nn

from ldm.conditioning import Cond
from ldm.diffusion import Diffusion
from ldm.exact import F64
from ldm.objectives import Draw
from ldm.objectives.base import Trained
from ldm.objectives.distribution import DMD, DMDConfig
from ldm.pairing import Independent
from ldm.predictions import Prediction, Velocity
from ldm.schedules import Flow, NoiseSchedule
from ldm.teacher import Teacher
from ldm.times import UniformTimes
from ldm.weighting import UniformWeight

FLOW = Flow(t_min=0.0)
REAL, OTHER = Data(FLOW, 0.5, 1.0), Data(FLOW, 0.8, 0.2)
TEACHER = Teacher(Exact(REAL))


def objective(schedule: NoiseSchedule = FLOW, prediction: Prediction | None = None, **settings: float) -> DMD:
    built = DMDConfig(**settings).build(  # type: ignore[arg-type]
        diffusion=Diffusion(schedule=schedule, prediction=prediction or Velocity()), times=UniformTimes(),
        weighting=UniformWeight(), pairing=Independent())
    assert isinstance(built, DMD)
    return built


def denoising(data: Data, prediction: Prediction | None = None) -> Trained:
    """A network that denoises known data: a perfect fake one."""
    return network(DMDConfig(), data, prediction, lambda x, t, s: data.denoised(x, t))


def compared(z: Tensor, t: Tensor, eps: Tensor, **more: Tensor) -> Draw:
    """A draw: a generator's noise, and at what time and with which noise its samples are compared."""
    return drawn(torch.ones_like(t), z, time=t, diffusing=eps, **more)


class Affine(nn.Module):
    """The generator m + s z of pure noise, by its velocity on `flow`: z - x0."""

    def __init__(self, mean: float = 0.2, std: float = 0.8) -> None:
        super().__init__()
        self.mean, self.std = (nn.Parameter(torch.tensor(value, dtype=F64)) for value in (mean, std))
        self.calls: list[float] = []

    def forward(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        self.calls.append(level[0].item() / 1000)
        return x - (self.mean + self.std * x)

    @property
    def data(self) -> Data:
        """What it makes."""
        return Data(FLOW, self.std.item(), self.mean.item())


class Linear(nn.Module):
    """The denoiser of a Gaussian at one time: a velocity that is linear in x."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(2, dtype=F64))

    def forward(self, x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        return self.coefficients[0] * x + self.coefficients[1]


def quadrature(count: int) -> tuple[Draw, Tensor]:
    """Every pair of two standard normal numbers that are z and eps at t = .4, and their weights: sums are means."""
    nodes, weights = (torch.tensor(part, dtype=F64) for part in hermegauss(count))
    z, eps = (part.reshape(-1, 1) for part in torch.meshgrid(nodes, nodes, indexing="ij"))
    t = torch.full((count**2,), 0.4, dtype=F64)
    return compared(z, t, eps), torch.outer(weights, weights).flatten() / weights.sum() ** 2
