"""The variational bound of a DDPM walk, term by term: what a learned variance is trained on, and bits per dimension.

A step from t to s has q(x_s | x_t, x0) of variance small = sigma_s^2 (1 - e^2), e^2 = SNR(t) / SNR(s), and p(x_s | x_t)
of log variance u log(large) + (1 - u) log(small) with large = sigma_t^2 (1 - e^2). Their divergence is
(u g + e^(-u g) (1 + SNR(s) (1 - e^2) (x0 - D)^2) - 1) / 2 with g = 2 ln(sigma_t / sigma_s) and D the network's x0: no
difference of nearly equal variances is left. Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 4 to 7 and 15.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.diffusion import Denoised
from ldm.noise import Noise
from ldm.schedules import NoiseSchedule, match

BIN = 2 / 255  # the width of an 8-bit value on [-1, 1]


def bound_at(schedule: NoiseSchedule, ends: Denoised, x0: Tensor, t: Tensor, *, bins: float = 0.0) -> Tensor:
    """The term of the step from t (B,) to t - 1/T, in bits per dimension, (B,).

    `ends` is the network's answer with its `log_var_frac` (without one the variance is the small one). The step that
    lands on t = 0 is -log p(x0 | x_t): of a density, or with `bins` > 0 of a discretised Gaussian with bins so wide,
    open at -1 and 1. Its small variance is that of the step before, as its own is 0.
    """
    step = 1 / schedule.steps
    last = t - step < schedule.t_min * (1 - 1e-9)
    # Each sample takes one of two terms. The other is thrown away, but must be finite for its gradient to be 0: it is
    # that of a step from t to t / 2.
    s = torch.where(last, t / 2, t - step)
    above, below = torch.where(last, t + step, t), torch.where(last, t, t / 2)
    fraction = torch.zeros_like(x0) if ends.log_var_frac is None else ends.log_var_frac
    error = (x0 - ends.x0).square()
    gap = match(2 * (schedule(t).sigma.log() - schedule(s).sigma.log()), x0)
    weight = -(schedule.logsnr(s).exp() * (schedule.logsnr(t) - schedule.logsnr(s)).expm1())
    divergence = (fraction * gap + (-fraction * gap).exp() * (1 + match(weight, x0) * error) - 1) / 2
    large = 2 * schedule(t).sigma.log()
    small = large + (-(schedule.logsnr(above) - schedule.logsnr(below)).expm1()).log()
    log_var = match(small, x0) + fraction * match(large - small, x0)
    decoder = -_log_bins(x0, ends.x0, log_var, bins) if bins else (
        log_var + math.log(2 * math.pi) + error * (-log_var).exp()) / 2
    terms = torch.where(last.to(x0.device).view(-1, *[1] * (x0.ndim - 1)), decoder, divergence)
    return terms.flatten(1).mean(1) / math.log(2)


def _log_bins(x: Tensor, mean: Tensor, log_var: Tensor, width: float) -> Tensor:
    """ln of the probability that N(mean, var) gives to the bin around x, the outermost being open."""
    std = (log_var / 2).exp()
    low, high = (x - width / 2 - mean) / std, (x + width / 2 - mean) / std
    low = torch.where(x < -1 + width / 2, -torch.inf, low)
    high = torch.where(x > 1 - width / 2, torch.inf, high)
    # Far above the mean both distribution functions are 1: the mirror image keeps their difference.
    flip = low > -high
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    upper: Tensor = torch.special.log_ndtr(high)
    return upper + torch.log(-torch.expm1((torch.special.log_ndtr(low) - upper).clamp(max=-1e-12)))


def prior_bits(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """The divergence of q(x_1 | x0) from the Gaussian that sampling starts with, in bits per dimension, (B,)."""
    alpha, sigma = schedule(torch.ones((), dtype=torch.float64))
    ratio = (sigma / schedule.prior_std) ** 2
    terms = ((alpha * x0 / schedule.prior_std).square() + ratio - 1 - ratio.log()) / 2
    return terms.flatten(1).mean(1) / math.log(2)


def bound(denoise: Denoise, x0: Tensor, noise: Noise, *, bins: float = 0.0) -> Tensor:
    """An upper bound of -log2 p(x0) per dimension, (B,): all T terms, one network call each, and the prior's."""
    schedule, steps = denoise.schedule, denoise.schedule.steps
    total = prior_bits(schedule, x0)
    with torch.no_grad():
        for index in range(1, steps + 1):
            t = torch.tensor(index / steps, dtype=torch.float64)
            alpha, sigma = schedule(t)
            x = alpha * x0 + sigma * noise.normal(x0.shape[1:], "eps", index, dtype=x0.dtype)
            total = total + bound_at(schedule, denoise(x, t), x0, t.expand(len(x0)), bins=bins)
    return total
