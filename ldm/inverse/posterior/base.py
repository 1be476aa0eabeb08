"""What every posterior sampler is: a rule that walks to a draw of x0 given y = A x0 + sigma_y n."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldm.checks import Checked
from ldm.denoiser import Bound, Denoise
from ldm.diffusion import Denoised
from ldm.inverse.operators import LinearOperator, Operator
from ldm.noise import Noise
from ldm.samplers import Snapshot, check_grid


@dataclass(frozen=True, eq=False)
class Problem:
    """A measurement y (B, ...) by an operator, and the standard deviation sigma_y of its noise, in units of y."""

    operator: Operator
    y: Tensor
    sigma_y: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x0."""
        return self.operator.domain(self.y)


class Posterior(Checked, ABC):
    """A way to draw x0 given y. Frozen and stateless; a sample depends on its own y and seed alone.

    `differentiates`: whether it takes gradients through the denoiser or the operator.
    """

    differentiates: ClassVar[bool] = False

    def draw(self, denoise: Denoise, operator: Operator, y: Tensor, sigma_y: float, grid: Tensor, noise: Noise,
             watch: Callable[[Snapshot], None] | None = None) -> Tensor:
        """x0 (B, C, H, W) of y (B, ...), along a grid that falls to 0; `watch` is called after every step.

        Raises ValueError for what the method cannot do, another grid, a wrong number of seeds, and under
        `torch.inference_mode` where it needs gradients.
        """
        problem, times = Problem(operator, y, sigma_y), check_grid(grid)
        self._check(problem, times, noise)
        calls, x = 0, y
        x0 = y

        def asked(x: Tensor, t: Tensor) -> Denoised:
            nonlocal calls, x0
            calls, ends = calls + 1, denoise(x, t)
            x0 = ends.x0.detach()
            return ends

        with torch.no_grad():
            for index, (x, t) in enumerate(self.walk(Bound(denoise.schedule, asked), problem, times, noise)):
                if watch is not None:
                    watch(Snapshot(index, t.item(), x, x0, calls))
        return x

    @abstractmethod
    def refusal(self, operator: Operator, sigma_y: float) -> str | None:
        """Why the method cannot use these, as the end of a sentence that begins with its kind, and what can; None where
        it can."""

    @abstractmethod
    def calls(self, grid: Tensor) -> int:
        """The number of network calls of a draw along the grid."""

    @abstractmethod
    def walk(self, denoise: Denoise, problem: Problem, times: Tensor, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
        """x and the time reached after each step, the last x being x0. Gradients are off."""

    def _check(self, problem: Problem, times: Tensor, noise: Noise) -> None:
        if len(noise) != len(problem.y):
            raise ValueError(f"{len(problem.y)} measurements need as many seeds, got {len(noise)}")
        if times[0] < times[1] or times[-1] != 0:
            raise ValueError(f"{self.kind} walks from noise to data: its grid must fall to 0, got "
                             f"{times[0].item():g} to {times[-1].item():g}")
        if not 0 <= problem.sigma_y < float("inf"):
            raise ValueError(f"sigma_y must be in [0, inf), got {problem.sigma_y}")
        if self.differentiates and torch.is_inference_mode_enabled():
            raise ValueError(f"{self.kind} takes gradients, which torch.inference_mode forbids; call it under "
                             "torch.no_grad, or outside of both")
        if (reason := self.refusal(problem.operator, problem.sigma_y)) is not None:
            raise ValueError(f"{self.kind} {reason}")


class OneCallAStep(Posterior):
    """A method that calls the network once for each step of the grid."""

    def calls(self, grid: Tensor) -> int:
        return len(grid) - 1


def needs_linear(operator: Operator) -> str | None:
    """The refusal of methods that work in the singular directions of an operator."""
    if isinstance(operator, LinearOperator):
        return None
    return "needs the singular values of a linear operator; for another one take resample or dps"
