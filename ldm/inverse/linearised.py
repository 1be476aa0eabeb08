"""An operator near one x0, as the linear map that solves ask for: itself, or its derivative by automatic
differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.diffusion import dot
from ldm.inverse.operators import LinearOperator, Operator
from ldm.schedules import match


class Local(NamedTuple):
    """A(x) near x0: `value` + J (x - x0)."""

    value: Tensor
    forward: Callable[[Tensor], Tensor]  # J v
    adjoint: Callable[[Tensor], Tensor]  # J^T w
    solve: Callable[[Tensor, Tensor, float], Tensor]  # (scale J J^T + noise I)^-1 residual


def leaf_of(x: Tensor) -> Tensor:
    """x cut off from its past, to be differentiated by. Raises ValueError under `torch.inference_mode`."""
    if torch.is_inference_mode_enabled():
        raise ValueError("this measurement takes derivatives, which torch.inference_mode forbids: draw under "
                         "torch.no_grad instead")
    return x.detach().requires_grad_()


def linearised(operator: Operator, x0: Tensor, cg_steps: int) -> Local:
    """The operator at x0. A linear one is itself, solved in closed form; of any other J is the derivative, and a solve
    takes at most `cg_steps` steps of conjugate gradients, each of two passes backwards."""
    if isinstance(operator, LinearOperator):
        return Local(operator(x0), operator, operator.adjoint, operator.solve)
    # Fused attention has no second derivative, which J v takes.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        leaf = leaf_of(x0)
        value = operator(leaf)
        weights = torch.zeros_like(value, requires_grad=True)
        (pulled,) = torch.autograd.grad(value, leaf, weights, create_graph=True)

    def adjoint(w: Tensor) -> Tensor:
        return torch.autograd.grad(value, leaf, w, retain_graph=True)[0]

    def forward(v: Tensor) -> Tensor:
        """J^T w is linear in w, and J its derivative there transposed."""
        return torch.autograd.grad(pulled, weights, v, retain_graph=True)[0]

    def solve(residual: Tensor, scale: Tensor, noise: float) -> Tensor:
        return conjugate_gradients(lambda w: match(scale, w) * forward(adjoint(w)) + noise * w, residual, cg_steps)

    return Local(value.detach(), forward, adjoint, solve)


def conjugate_gradients(apply: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """apply^-1 b for a symmetric positive `apply` that keeps samples apart, by at most `steps` steps for each sample.

    A sample stops where its residual is sqrt(eps) of b, eps the precision's, or where `apply` is not positive along its
    next direction. Hestenes & Stiefel 1952.
    """
    x, residual = torch.zeros_like(b), b
    direction, square = b, dot(b, b)
    enough = square * torch.finfo(b.dtype).eps
    going = square > enough
    for _ in range(steps):
        if not bool(going.any()):
            break
        image = apply(direction)
        curvature = dot(direction, image)
        going = going & (curvature > 0)
        size = torch.where(going, square / curvature, 0)
        x, residual = x + size * direction, residual - size * image
        left = dot(residual, residual)
        direction = residual + torch.where(going, left / square, 0) * direction
        square, going = left, going & (left > enough)
    return x
