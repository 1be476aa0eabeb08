"""The derivative of a network's answer along a direction in (x, t): what objectives in continuous time learn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.schedules import match

How = Literal["jvp", "finite-difference"]


def along(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, dx: Tensor, how: str,
          h: float) -> tuple[Tensor, Tensor]:
    """function(x, t) and d/da function(x + a dx, t + a) at a = 0, both (B, ...) and without gradient.

    x and dx (B, ...), t (B,) float64 in (0, 1]. `how`: "jvp", exact by forward-mode differentiation, for which
    attention takes its plain kernel and nothing is compiled; or "finite-difference", of second order with steps h in t,
    for a network that has none: between t - h and t + h, from t backwards where t + h is above 1, and in smaller steps
    near 0. Autocast is off: it rounds by more than two near answers differ, and convolutions have no forward derivative
    under it.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if how == "finite-difference":
            return _difference(function, x, t, dx, h)
        # Neither fused kernels nor what is compiled have a forward derivative.
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            value, slope = torch.func.jvp(function, (x, t), (dx, torch.ones_like(t)))[:2]
        return value.detach(), slope.detach()


def _difference(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, dx: Tensor,
                h: float) -> tuple[Tensor, Tensor]:
    """The value, and the slope at t of the parabola through it and two more."""
    step = (t / 8).clamp(max=h)  # no network answers at 0 and below
    near, far = -step, torch.where(t + step > 1, -2 * step, step)
    value = function(x, t)
    slope = match(-(near + far) / (near * far), x) * value
    for a, b in ((near, far), (far, near)):
        slope = slope + match(b / (a * (b - a)), x) * function(x + match(a, x) * dx, t + a)
    return value, slope
