"""Score distillation sampling: what makes a picture is moved to where a denoiser would have the picture.

Poole et al. 2022 (arXiv 2209.14988), eq. 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.denoiser import Conditional
from ldm.schedules import match


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss (B,) float32 whose gradient in x (B, ...) is `gradient`, element by element, which itself is a constant.

    Its value is half the sum of the squares of that, which is no distance: it need not fall while x gets better.
    """
    pull = gradient.detach()
    # x - x.detach() is 0: no rounding of x enters, as it would in the square of x - (x - gradient).
    return (0.5 * pull.square() + pull * (x - x.detach())).float().flatten(1).sum(1)


def score_distillation(x: Tensor, denoiser: Conditional, cond: Any, t: Tensor, eps: Tensor,
                       weight: Tensor | None = None) -> Tensor:
    """A loss (B,) float32 whose gradient in x (B, ...) is w(t) (eps_hat(x_t) - eps), x_t = alpha x + sigma eps.

    The network's Jacobian is left out, so that nothing is differentiated but x. t () or (B,) float64 in [t_min, 1], eps
    like x, and `weight` () or (B,), by default sigma^2, are drawn anew for each step. The mean over eps is sigma w(t)
    times the difference between the score of N(alpha x, sigma^2) and that of the data: a KL divergence from the noised
    data, whose least value is at a mode. So pictures are over-smooth, and the same from every beginning where the data
    have one mode; a strong guidance (`ldm.teacher.Teacher`, scale 100 in the paper) makes of each condition nearly one.
    """
    with torch.no_grad():
        level = denoiser.schedule(t)
        x_t = match(level.alpha, x) * x + match(level.sigma, x) * eps
        off = denoiser(x_t, t, cond).eps - eps
    return surrogate(x, match(level.sigma**2 if weight is None else weight, x) * off)
